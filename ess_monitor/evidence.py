"""What one measurement says, before it is judged: serialisable for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ess_monitor.records import Reading


@dataclass(frozen=True)
class Evidence:
    """Readings and metrics of one sampled step."""

    step: int
    """Step of the sample."""
    readings: tuple[Reading, ...]
    metrics: dict[str, float] = field(default_factory=dict)
    nonfinite: frozenset[str] = frozenset()
    """Metrics that were NaN or infinite."""

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
