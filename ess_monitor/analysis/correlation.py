"""Says of many runs how their sizes go along with what they learned (sections 3.1 and 3.2 of the paper)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from statistics import correlation, fmean
from typing import NamedTuple

from ess_monitor import validation
from ess_monitor.analysis.study_results import Correlation, CorrelationDifference, Quantity, Study, StudyCell, StudyRun
from ess_monitor.errors import ConfigError

FEWEST = 3
"""Points of a correlation at least: through two there is always a line."""
_ROUNDING = 1e-12
"""Values that differ by less, as a share of the largest, are equal: the mean of equal numbers may be off by as much."""

_QUANTITIES: dict[Quantity, Callable[[StudyRun], float | None]] = {
    "ESS / demand": lambda run: _ratio(run.effective_size, run.demand),
    "entropy-ESS / demand": lambda run: _ratio(run.entropy_size, run.demand),
    "TSS / demand": lambda run: _ratio(run.state_capacity, run.demand),
    "ESS": lambda run: run.effective_size,
    "TSS": lambda run: run.state_capacity,
}

_PAIRS: tuple[tuple[Quantity, Quantity], ...] = (
    ("ESS / demand", "TSS / demand"), ("entropy-ESS / demand", "TSS / demand"), ("ESS", "TSS")
)  # fmt: skip
"""Quantities whose correlations are compared."""


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Pearson's r; None of fewer than three points, or where one of the two is constant.

    >>> pearson([1, 2, 3], [2, 4, 6]), pearson([1, 2, 3], [5, 5, 5]), pearson([1, 2], [1, 2])
    (1.0, None, None)
    """
    if len(x) < FEWEST:
        return None
    first, second = _scaled(x), _scaled(y)
    return None if first is None or second is None else correlation(first, second)


def _scaled(values: Sequence[float]) -> list[float] | None:
    """Return values with a common exponent below 1, whose squares do not overflow or vanish; None of equal ones."""
    _, exponent = math.frexp(max(map(abs, values)))
    scaled = [math.ldexp(value, -exponent) for value in values]
    return scaled if max(scaled) - min(scaled) > _ROUNDING else None


def correlate(
    runs: Sequence[StudyRun],
    *,
    metric: str = "metric",
    demand: str = "",
    resamples: int = 1000,
    by_configuration: bool = False,
    seed: int = 0,
    notes: Sequence[str] = (),
) -> Study:
    """Return how ESS, TSS and both over the demand of the task go along with the final metric, over runs.

    Finding 1 of the paper compares r of ESS / kv with r of TSS / kv; Finding 2 looks at the correlation within each run
    by TSS and kv. Intervals are percentiles over resamples of the runs.

    Args:
        runs: what `ess_monitor.report.load_study` reads from event logs.
        metric: its name, for tables.
        demand: its name, for tables.
        resamples: of the bootstrap; 0 gives no intervals.
        by_configuration: resample configurations, not runs: runs of the same task, kind of layer, TSS and demand, such
            as seeds, stay together. They are no independent evidence of how sizes go along with the metric.
        seed: of the bootstrap.
        notes: passed on.

    Raises:
        ConfigError: `runs` is empty, or holds something else.

    Examples:
        >>> runs = [StudyRun(name=str(k), metric=0.1 * k, effective_size=k, demand=2) for k in range(1, 6)]
        >>> study = correlate(runs, metric="accuracy", demand="kv_pairs")
        >>> [(each.quantity, each.r) for each in study.correlations if each.r is not None]
        [('ESS / demand', 1.0), ('ESS', 1.0)]
    """
    runs = validation.several("runs", runs, StudyRun, hint="load_study(folder) reads them")
    if not runs:
        raise ConfigError("runs is empty; give the runs of a study, which load_study(folder) reads.")
    for name, text in (("metric", metric), ("demand", demand)):
        validation.instance(name, text, str, hint="a name")
    resamples = validation.whole("resamples", resamples, 0, 1_000_000)
    by_configuration = validation.flag("by_configuration", by_configuration)
    seed = validation.whole("seed", seed, 0)
    notes = validation.several("notes", notes, str)
    kinds = sorted({(run.task, run.featurizer) for run in runs})
    groups: list[tuple[str, str, Sequence[StudyRun]]] = [("", "", runs)]
    if len(kinds) > 1:
        groups += [(*kind, [run for run in runs if (run.task, run.featurizer) == kind]) for kind in kinds]
    bootstrap = _Bootstrap(resamples, by_configuration, seed)
    correlations = [_correlation(*group, quantity, bootstrap) for group in groups for quantity in _QUANTITIES]
    differences = [_difference(*group, *pair, bootstrap) for group in groups for pair in _PAIRS]
    return Study(
        metric=metric,
        demand=demand,
        runs=runs,
        correlations=tuple(each for each in correlations if each.runs),
        differences=tuple(each for each in differences if each.runs),
        by_configuration=by_configuration,
        cells=tuple(_cells(runs)),
        notes=notes,
    )


def _correlation(
    task: str, featurizer: str, runs: Iterable[StudyRun], quantity: Quantity, bootstrap: _Bootstrap
) -> Correlation:
    points = _points(runs, quantity)
    r, low, high = bootstrap.interval(points, lambda drawn: _r(drawn, 0))
    return Correlation(task=task, featurizer=featurizer, quantity=quantity, runs=len(points), r=r, low=low, high=high)


def _difference(
    task: str, featurizer: str, runs: Iterable[StudyRun], quantity: Quantity, other: Quantity, bootstrap: _Bootstrap
) -> CorrelationDifference:
    points = _points(runs, quantity, other)

    def difference(drawn: Sequence[_Point]) -> float | None:
        first, second = _r(drawn, 0), _r(drawn, 1)
        return None if first is None or second is None else first - second

    found, low, high = bootstrap.interval(points, difference)
    return CorrelationDifference(
        task=task, featurizer=featurizer, quantity=quantity, other=other, runs=len(points),
        difference=found, low=low, high=high,
    )  # fmt: skip


def _points(runs: Iterable[StudyRun], *quantities: Quantity) -> list[_Point]:
    """Return the quantities and the metric of every run that has them all."""
    points = []
    for run in runs:
        sizes = [size for each in quantities if (size := _QUANTITIES[each](run)) is not None]
        if len(sizes) == len(quantities) and run.metric is not None:
            points.append(_Point(_configuration(run), (*sizes, run.metric)))
    return points


def _configuration(run: StudyRun) -> tuple[str, str, float | None, float | None]:
    return run.task, run.featurizer, run.state_capacity, run.demand


def _r(points: Sequence[_Point], place: int) -> float | None:
    return pearson([each.values[place] for each in points], [each.values[-1] for each in points])


class _Point(NamedTuple):
    configuration: tuple[str, str, float | None, float | None]
    values: tuple[float, ...]
    """Quantities, and last the metric."""


class _Bootstrap(NamedTuple):
    resamples: int
    by_configuration: bool
    seed: int

    def interval(
        self, points: Sequence[_Point], statistic: Callable[[Sequence[_Point]], float | None]
    ) -> tuple[float | None, float | None, float | None]:
        """Return a statistic of the points, and its 2.5 and 97.5 percentile over resamples.

        Resamples in which it is undefined are left out. Fewer than three configurations say nothing of others.
        """
        value = statistic(points)
        if value is None:
            return None, None, None
        groups: dict[object, list[_Point]] = {}
        for place, point in enumerate(points):
            groups.setdefault(point.configuration if self.by_configuration else place, []).append(point)
        units, generator = list(groups.values()), random.Random(self.seed)
        if len(units) < FEWEST:
            return value, None, None
        drawn = (list(chain(*generator.choices(units, k=len(units)))) for _ in range(self.resamples))
        found = sorted(each for resample in drawn if (each := statistic(resample)) is not None)
        return (value, _percentile(found, 0.025), _percentile(found, 0.975)) if found else (value, None, None)


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Return a percentile, linear between neighbors as numpy's default.

    >>> _percentile([0.0, 1.0, 2.0], 0.25)
    0.5
    """
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _ratio(size: float | None, demand: float | None) -> float | None:
    return size / demand if size is not None and demand else None


def _cells(runs: Iterable[StudyRun]) -> Iterable[StudyCell]:
    groups: dict[tuple[str, str, float, float], list[StudyRun]] = {}
    for run in runs:
        if run.state_capacity is not None and run.demand is not None:
            groups.setdefault((run.task, run.featurizer, run.state_capacity, run.demand), []).append(run)
    for (task, featurizer, capacity, demand), group in sorted(groups.items()):
        yield StudyCell(
            task=task,
            featurizer=featurizer,
            state_capacity=capacity,
            demand=demand,
            runs=len(group),
            metric=mean_of_known(run.metric for run in group),
            effective_size=mean_of_known(run.effective_size for run in group),
            utilization_ratio=mean_of_known(run.utilization_ratio for run in group),
            within_correlation=mean_of_known(run.within_correlation for run in group),
        )


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are known; None without any.

    >>> mean_of_known([1.0, None, 2.0]), mean_of_known([None])
    (1.5, None)
    """
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
