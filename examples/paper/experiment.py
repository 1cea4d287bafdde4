"""An experiment is many short runs, and what they say of findings of the paper. Runs are kept, so it can be resumed."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ray
from scipy.stats import rankdata
from scipy.stats import t as student_t

import examples
from ess_monitor.analysis.correlation import pearson
from ess_monitor.report.components import Table
from ess_monitor.report.figures import Figure
from examples import sweep

Run = dict[str, Any]
"""Settings of a run; what it returned is added to them."""
Verdict = Literal["reproduced", "partly", "not reproduced", "open"]
"""`open` is for questions that the paper asks and does not answer."""

SEEDS = (100, 101, 102, 103, 104)
"""Seeds of the page. An experiment takes the first of them, at least three."""
SEEN = (0, 1)
"""Seeds with which settings and rules were fixed. None of them is on the page."""


@dataclass(frozen=True)
class Finding:
    """What the paper says, and what came out here."""

    name: str
    """`Finding 6`, or `Open question 2`."""
    claim: str
    """What the paper says or asks, in our words."""
    source: str
    """Where it says so: `section 4.2, figure 5b`."""
    setting: str
    """What was run: net, task, sizes, steps, arms."""
    rule: str
    """When it counts as reproduced, and when as partly; fixed before the seeds of the page were run."""
    verdict: Verdict
    result: str
    """What came out, in a sentence or two with numbers and intervals."""
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    remarks: tuple[str, ...] = ()
    """What departs from the paper's setting, what was seen besides, what stays unknown."""


@dataclass(frozen=True)
class Experiment:
    """Runs, and what is found in their results."""

    name: str
    """Name of its module, too."""
    runs: Callable[[Sequence[int], bool], list[Run]]
    """Settings of every run, for these seeds. Short ones take seconds and prove nothing: they keep the code running."""
    run: Callable[[Run], Run]
    """Does one run, on one core, in a process of its own; returns what is to be kept of it, as JSON."""
    findings: Callable[[list[Run]], list[Finding]]
    """Says what the results mean."""
    seeds: tuple[int, ...] = SEEDS[:3]


@dataclass
class Outcome:
    """An experiment that was run."""

    experiment: Experiment
    rows: list[Run]
    findings: list[Finding] = field(default_factory=list)

    @property
    def minutes(self) -> float:
        """Minutes of one core."""
        return sum(row["seconds"] for row in self.rows) / 60


def planned(experiment: Experiment, seeds: Sequence[int], short: bool) -> list[Run]:
    """Return the settings of every run, with an id that is unique to them."""
    runs = experiment.runs(seeds, short)
    return [{**run, "run_id": f"{experiment.name}-{_digest(run)}"} for run in runs]


def _digest(run: Run) -> str:
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Start Ray or connect to a cluster, whose workers need not have the files of the examples."""
    with sweep.cluster(address):
        ray.cloudpickle.register_pickle_by_value(examples)
        try:
            yield
        finally:
            ray.cloudpickle.unregister_pickle_by_value(examples)


def perform(runs: list[Run], experiment: Experiment, folder: Path) -> Iterator[Run]:
    """Yield the result of every run: first those that were kept in `folder`, then the others as they end."""
    kept, others = sweep.resumed(timed, runs, folder, experiment.run)
    yield from kept
    yield from others


def timed(settings: Run, run: Callable[[Run], Run]) -> Run:
    """Do one run on one thread; return its settings, its results and the processor seconds that it took."""
    import torch

    torch.set_num_threads(1)
    started = time.process_time()
    found = run(settings)
    return {**settings, **found, "seconds": time.process_time() - started}


def interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float, float]:
    """Return mean and confidence interval over seeds, by Student's t.

    >>> [round(each, 2) for each in interval([1.0, 2.0, 3.0])]
    [2.0, -0.48, 4.48]
    """
    values = list(values)
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("-inf"), float("inf")
    half = float(student_t.ppf((1 + level) / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def shown(values: Iterable[float], digits: int = 2) -> str:
    """Return mean and half the width of its interval, as text.

    >>> shown([1.0, 2.0, 3.0])
    '2.00 ± 2.48'
    """
    values = list(values)
    if not values:
        return "undefined"
    mean, low, _ = interval(values)
    return f"{mean:.{digits}f}" if low == float("-inf") else f"{mean:.{digits}f} ± {mean - low:.{digits}f}"


def paired(
    first: Iterable[Run], second: Iterable[Run], value: Callable[[Run], float | None]
) -> list[tuple[int, float]]:
    """Return seed and difference of each pair of runs that both have the value; both are in the order of seeds."""
    both = [(one["seed"], value(one), value(other)) for one, other in zip(first, second, strict=True)]
    return [(seed, one - other) for seed, one, other in both if one is not None and other is not None]


def by_seed(pairs: Iterable[tuple[int, float]]) -> list[float]:
    """Return the mean of every seed: what is averaged within a seed is no evidence of its own.

    >>> by_seed([(0, 1.0), (1, 5.0), (0, 3.0)])
    [2.0, 5.0]
    """
    of_seed: dict[int, list[float]] = {}
    for seed, value in pairs:
        of_seed.setdefault(seed, []).append(value)
    return [statistics.fmean(values) for values in of_seed.values()]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's correlation; 0 of fewer than three points, and where one of the two is constant.

    >>> round(rank_correlation([1.0, 2.0, 2.0, 3.0], [10.0, 20.0, 30.0, 40.0]), 3), rank_correlation([1.0], [2.0])
    (0.949, 0.0)
    """
    return pearson(rankdata(x).tolist(), rankdata(y).tolist()) or 0.0


def number(value: float | None) -> str:
    """Return a cell of a table; unknown values are a dash."""
    return "-" if value is None else f"{value:.2f}"
