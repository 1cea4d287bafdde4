"""Defines the results of a study of many runs: frozen records, as rows for a data frame. Loads no torch."""

from __future__ import annotations

from typing import Any, Literal

from ess_monitor.analysis.results import AnalysisResult
from ess_monitor.records import Record

Quantity = Literal["ESS / demand", "entropy-ESS / demand", "TSS / demand", "ESS", "TSS"]
"""What is compared with the final metric. The demand is what the task asks a memory for, such as key-value pairs."""


class StudyRun(Record):
    """What a study knows of one run. Sizes are means over the layers that were measured."""

    name: str
    log: str = ""
    """Path of its event log."""
    task: str = ""
    featurizer: str = ""
    """Kind of its layers."""
    demand: float | None = None
    """What its task asks a memory for: the number of key-value pairs."""
    state_capacity: float | None = None
    """TSS per head at the end."""
    effective_size: float | None = None
    """Tolerance-ESS at the end."""
    entropy_size: float | None = None
    """Entropy-ESS at the end."""
    utilization_ratio: float | None = None
    """ESS / TSS at the end, 0 to 1."""
    metric: float | None = None
    """The task metric at the end."""
    within_correlation: float | None = None
    """Correlation of ESS and metric over the measurements of the run, without the first (appendix C.3). None of fewer
    than three, or where one of them never changes."""
    hyperparameters: dict[str, bool | int | float | str | None] = {}


class Correlation(Record):
    """How a quantity goes along with the final metric, over runs."""

    task: str
    """Empty: of all tasks together."""
    featurizer: str
    """Empty: of all kinds of layers together."""
    quantity: Quantity
    runs: int
    """Number of runs that have both."""
    r: float | None
    """Pearson's correlation. None of fewer than three runs, or where one of the two never changes."""
    low: float | None = None
    """Lower end of the bootstrap interval that holds r in 95 % of the resamples."""
    high: float | None = None
    """Upper end of the same."""


class CorrelationDifference(Record):
    """By how much better one quantity goes along with the final metric than another, over the runs that have both.

    Finding 1 of the paper says that it is above 0 for ESS / kv against TSS / kv.
    """

    task: str
    """Empty: of all tasks together."""
    featurizer: str
    """Empty: of all kinds of layers together."""
    quantity: Quantity
    other: Quantity
    runs: int
    """Number of runs that have both quantities and the metric."""
    difference: float | None
    """r of the quantity minus r of the other, -2 to 2. None where one of the two is undefined."""
    low: float | None = None
    """Lower end of the bootstrap interval that holds the difference in 95 % of the resamples: both correlations are
    taken of the same resampled runs."""
    high: float | None = None
    """Upper end of the same."""


class StudyCell(Record):
    """The runs of one task, kind of layer, TSS and demand: means over them, each of those runs that have it."""

    task: str
    featurizer: str
    state_capacity: float
    """TSS per head."""
    demand: float
    runs: int
    metric: float | None
    effective_size: float | None
    utilization_ratio: float | None
    within_correlation: float | None


class Study(AnalysisResult):
    """What many runs say together."""

    metric: str
    """Name of the task metric."""
    demand: str
    """Name of the hyperparameter that is the demand; empty where the runs have none."""
    runs: tuple[StudyRun, ...]
    correlations: tuple[Correlation, ...] = ()
    """Of all runs, and of each task and kind of layer where there are several."""
    differences: tuple[CorrelationDifference, ...] = ()
    """Of the same groups: ESS and entropy-ESS against TSS."""
    by_configuration: bool = False
    """Intervals are of resampled configurations, not of resampled runs."""
    cells: tuple[StudyCell, ...] = ()
    """By task, kind of layer, TSS and demand."""
    notes: tuple[str, ...] = ()
    """What else is to be known."""

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each run; the hyperparameters are columns of their own."""
        names = sorted({name for run in self.runs for name in run.hyperparameters})
        return [
            {
                "metric_name": self.metric,
                **run.model_dump(exclude={"hyperparameters"}),
                **{f"hyperparameter_{name}": run.hyperparameters.get(name) for name in names},
            }
            for run in self.runs
        ]
