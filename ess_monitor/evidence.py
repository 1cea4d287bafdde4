"""What one measurement says, before it is judged: made comparable across ranks, and serialisable for a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ess_monitor.records import Reading
from ess_monitor.runtime import Agreement, agreed_mean

_AGREED = (
    "state_capacity",
    "attainable_size",
    "effective_size",
    "entropy_size",
    "utilization_ratio",
    "retention_ratio",
    "mean_decay",
)
"""Fields of a reading that become means over the ranks. Diagnosis and autopilot decide on these."""


@dataclass(frozen=True)
class Evidence:
    """Readings and metrics of one sampled step."""

    step: int
    """Step of the sample."""
    readings: tuple[Reading, ...]
    metrics: dict[str, float] = field(default_factory=dict)
    nonfinite: frozenset[str] = frozenset()
    """Metrics that were NaN or infinite."""
    errors: tuple[str, ...] = ()
    """What went wrong in the worker."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "step": self.step,
            "readings": [reading.model_dump(mode="json") for reading in self.readings],
            "metrics": dict(self.metrics),
            "nonfinite": sorted(self.nonfinite),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Evidence:
        """The evidence as it was."""
        readings = tuple(Reading.model_validate(reading) for reading in state["readings"])
        return cls(int(state["step"]), readings, dict(state["metrics"]), frozenset(state["nonfinite"]))


def agree(
    evidence: Evidence,
    layers: Sequence[str],
    metrics: Sequence[str],
    interval_steps: int,
    agreement: Agreement,
) -> tuple[Evidence, int]:
    """The same evidence on all ranks: means over those that have a number, and the longest interval.

    A layer counts as measured where at least one rank measured it; a metric is non-finite where it is on any rank.
    """
    mine = {reading.layer: reading for reading in evidence.readings}
    vector = [float(interval_steps)]
    for name in metrics:
        vector += [evidence.metrics.get(name, math.nan), float(name in evidence.nonfinite)]
    for name in layers:
        measured = mine[name] if name in mine and mine[name].status == "ok" else None
        vector += [_number(getattr(measured, quantity, None)) for quantity in _AGREED]
    columns = list(zip(*agreement.exchange(vector), strict=True))
    interval = int(max(columns[0]))
    numbers, broken = dict(evidence.metrics), set(evidence.nonfinite)
    for k, name in enumerate(metrics):
        mean = agreed_mean(columns[1 + 2 * k])
        numbers.pop(name, None)
        if not math.isnan(mean):
            numbers[name] = mean
        if max(columns[2 + 2 * k]) > 0:
            broken.add(name)
    start = 1 + 2 * len(metrics)
    readings = []
    for k, name in enumerate(layers):
        block = columns[start + k * len(_AGREED) : start + (k + 1) * len(_AGREED)]
        means = {quantity: agreed_mean(column) for quantity, column in zip(_AGREED, block, strict=True)}
        local = mine.get(name)
        if math.isnan(means["effective_size"]):
            if local is not None:
                readings.append(local)
            continue
        base = local or Reading(step=evidence.step, layer=name, status="ok")
        values = {quantity: None if math.isnan(mean) else mean for quantity, mean in means.items()}
        readings.append(base.model_copy(update={**values, "status": "ok", "message": ""}))
    return Evidence(evidence.step, tuple(readings), numbers, frozenset(broken), evidence.errors), interval


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
