"""Says of many runs how their sizes go along with what they learned (sections 3.1 and 3.2 of the paper)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from statistics import StatisticsError, correlation, fmean

from ess_monitor import validation
from ess_monitor.analysis.study_results import Correlation, Quantity, Study, StudyCell, StudyRun
from ess_monitor.errors import ConfigError

FEWEST = 3
"""Points of a correlation at least: through two there is always a line."""

_QUANTITIES: dict[Quantity, Callable[[StudyRun], float | None]] = {
    "ESS / demand": lambda run: _ratio(run.effective_size, run.demand),
    "entropy-ESS / demand": lambda run: _ratio(run.entropy_size, run.demand),
    "TSS / demand": lambda run: _ratio(run.state_capacity, run.demand),
    "ESS": lambda run: run.effective_size,
    "TSS": lambda run: run.state_capacity,
}


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Pearson's r; None of fewer than three points, or where one of the two is constant.

    >>> pearson([1, 2, 3], [2, 4, 6]), pearson([1, 2, 3], [5, 5, 5]), pearson([1, 2], [1, 2])
    (1.0, None, None)
    """
    if len(x) < FEWEST:
        return None
    try:
        return correlation(x, y)
    except StatisticsError:
        return None


def correlate(
    runs: Sequence[StudyRun],
    *,
    metric: str = "metric",
    demand: str = "",
    resamples: int = 1000,
    seed: int = 0,
    notes: Sequence[str] = (),
) -> Study:
    """Return how ESS, TSS and both over the demand of the task go along with the final metric, over runs.

    Finding 1 of the paper compares r of ESS / kv with r of TSS / kv; Finding 2 looks at the correlation within each run
    by TSS and kv. Intervals are percentiles of r over resamples of the runs.

    Args:
        runs: what `ess_monitor.report.load_study` reads from event logs.
        metric: its name, for tables.
        demand: its name, for tables.
        resamples: of the bootstrap; 0 gives no intervals.
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
    seed = validation.whole("seed", seed, 0)
    notes = validation.several("notes", notes, str)
    kinds = sorted({(run.task, run.featurizer) for run in runs})
    groups = [("", "", runs)] + [(*kind, [run for run in runs if (run.task, run.featurizer) == kind]) for kind in kinds]
    correlations = [
        _correlation(task, featurizer, quantity, group, resamples, seed)
        for task, featurizer, group in (groups if len(kinds) > 1 else groups[:1])
        for quantity in _QUANTITIES
    ]
    return Study(
        metric=metric,
        demand=demand,
        runs=runs,
        correlations=tuple(each for each in correlations if each.runs),
        cells=tuple(_cells(runs)),
        notes=notes,
    )


def _correlation(
    task: str, featurizer: str, quantity: Quantity, runs: Iterable[StudyRun], resamples: int, seed: int
) -> Correlation:
    pairs = [
        (size, run.metric)
        for run in runs
        if (size := _QUANTITIES[quantity](run)) is not None and run.metric is not None
    ]
    x, y = [value for value, _ in pairs], [value for _, value in pairs]
    r = pearson(x, y)
    low, high = (None, None) if r is None else _interval(pairs, resamples, seed)
    return Correlation(task=task, featurizer=featurizer, quantity=quantity, runs=len(pairs), r=r, low=low, high=high)


def _interval(pairs: Sequence[tuple[float, float]], resamples: int, seed: int) -> tuple[float | None, float | None]:
    """Return the 2.5 and the 97.5 percentile of r over resamples; those in which one of the two is constant are left
    out."""
    generator = random.Random(seed)
    drawn = (generator.choices(pairs, k=len(pairs)) for _ in range(resamples))
    found = sorted(r for each in drawn if (r := pearson(*zip(*each, strict=True))) is not None)
    return (_percentile(found, 0.025), _percentile(found, 0.975)) if found else (None, None)


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
