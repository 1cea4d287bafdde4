"""Readings as the monitor would give them, from the two numbers a test cares about."""

from __future__ import annotations

from collections.abc import Sequence

from ess_monitor.diagnosis import DiagnosisConfig, Tracker
from ess_monitor.records import Finding, Reading, Status

TASK = DiagnosisConfig(metric="accuracy", metric_solved=0.95)
"""The task-aware diagnosis of the MQAR experiments."""


def reading(
    utilization: float,
    retention: float | None = 1.0,
    *,
    layer: str = "mixer.1",
    state_capacity: int = 16,
    length: int = 64,
    positions: Sequence[int] | None = None,
    status: Status = "ok",
    capacity_grows: bool = False,
) -> Reading:
    """A reading at ESS / TSS = `utilization`, measured at the quarter positions unless said otherwise."""
    positions = tuple(positions) if positions is not None else (length // 4, length // 2, 3 * length // 4)
    attainable = [min(state_capacity, p, length - p) for p in positions]
    mean_attainable = sum(attainable) / len(attainable)
    size = utilization * state_capacity
    return Reading(
        step=0,
        layer=layer,
        status=status,
        length=length,
        positions=positions,
        state_capacity=state_capacity,
        capacity_grows=capacity_grows,
        attainable_size=mean_attainable,
        effective_size=size,
        # As if every position used the same share of what its geometry allows.
        per_position=tuple(size / mean_attainable * a for a in attainable),
        utilization_ratio=utilization,
        retention_ratio=retention,
    )


class Run:
    """A training run as the diagnosis sees it: one measurement every hundred steps."""

    def __init__(self, config: DiagnosisConfig) -> None:
        self.tracker = Tracker(config)
        self.step = 0
        self.findings: list[Finding] = []

    def measure(self, *readings: Reading, accuracy: float | None = None, times: int = 1, repeated: bool = False) -> Run:
        """The accuracy is computed anew at each measurement, and so differs in its last bits, unless it is repeated."""
        for _ in range(times):
            self.step += 100
            noise = 0.0 if repeated else 1e-12 * (self.step // 100 % 2)
            metrics = {} if accuracy is None else {"accuracy": accuracy + noise}
            self.findings += self.tracker.observe(readings, metrics, self.step)
        return self

    def condition(self, layer: str = "mixer.1") -> str:
        return self.tracker.conditions[layer]
