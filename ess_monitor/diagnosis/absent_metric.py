"""Notices that the task metric of the diagnosis is never among the metrics that the training loop gives."""

from __future__ import annotations

from collections.abc import Collection

from ess_monitor.diagnosis import DiagnosisConfig
from ess_monitor.records import SampleResult

NOT_GIVEN = " was not among the metrics"
"""What every such warning says."""
_LISTED = 20
"""Names of other metrics that the warning repeats."""


class AbsentMetric:
    """Warns once, when the warm-up is over and `patience` measurements had other metrics, but not this one.

    A loop that gives no metrics at all may give them once an epoch: it has `metric_constant_after` measurements.

    Args:
        config: names the metric.

    Examples:
        >>> from ess_monitor.records import Reading
        >>> absent = AbsentMetric(DiagnosisConfig(metric="acc", metric_solved=0.9, warmup_steps=0, patience=1))
        >>> reading = Reading(step=1, layer="mixer", status="ok")
        >>> absent.observe(SampleResult(1, (reading,), {"accuracy": 0.5}), known=False)[:46]
        "diagnosis: metric='acc' was not among the metr"
    """

    def __init__(self, config: DiagnosisConfig) -> None:
        self._config = config
        self._is_settled = config.metric is None
        self._measurements = 0
        self._with_metrics = 0
        self._names: Collection[str] = ()
        """Of the metrics that were given last."""

    def observe(self, result: SampleResult, *, known: bool, others: Collection[str] = ()) -> str:
        """Return the warning, or an empty string.

        Args:
            result: one measurement.
            known: whether a value of the metric has been seen, in a run that was resumed from included.
            others: names of metrics that came at steps that were not sampled.
        """
        names = {*result.metrics, *result.nonfinite}
        self._is_settled = self._is_settled or known or self._config.metric in names
        if self._is_settled or not result.readings:
            return ""
        self._measurements += 1
        if names:
            self._with_metrics += 1
            self._names = names
        missed = self._with_metrics >= self._config.patience
        if not (missed or self._measurements >= self._config.metric_constant_after):
            return ""
        if result.step < self._config.warmup_steps:
            return ""
        self._is_settled = True
        self._names = {*self._names, *others}
        return absence(self._config.metric, self._measurements, self._names)


def absence(metric: str | None, measurements: int, names: Collection[str]) -> str:
    """Return what is said of a metric that was never among those of the training loop.

    Args:
        metric: its name.
        measurements: how many there were.
        names: of the metrics that were given.

    Examples:
        >>> absence("acc", 5, ["loss", "accuracy"])[:85]
        "diagnosis: metric='acc' was not among the metrics in 5 measurements; given were accur"
    """
    shown = f"diagnosis: metric={metric!r:.200}{NOT_GIVEN}"
    effect = "The diagnosis goes on by the rules for runs without a task metric."
    if not names:
        return (
            f"{shown}: step was given no metrics in {measurements} measurements. {effect} Give it to step(metrics=...)."
        )
    listed = ", ".join(f"{name:.80}" for name in sorted(names)[:_LISTED])
    others = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (
        f"{shown} in {measurements} measurements; given were {listed}{others}. "
        f"{effect} Set diagnosis.metric to one of these names, unless the metric comes later, as at the end of an "
        "epoch."
    )
