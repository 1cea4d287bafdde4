"""What the autopilot is told of one measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ess_monitor.interventions.alpha import Optimizers
from ess_monitor.records import Changes, Condition, Evidence, Reading

LOW: tuple[Condition, ...] = ("collapsed", "unused")
"""Conditions that a treatment is to end."""


@dataclass(frozen=True)
class Observation:
    """Holds one measurement, and what was learned from batches that were run again since the one before."""

    step: int
    readings: Mapping[str, Reading]
    """Usable reading of each layer that has one."""
    conditions: Mapping[str, Condition]
    reasons: Mapping[str, str]
    """Why a layer's condition has just changed, for those whose has."""
    loss: float | None
    optimizer: Optimizers
    evidence: Mapping[str, Evidence] | None = None
    """Latest evidence on each layer that was examined. None: none is asked for, and treatments are not tried out."""
    comparisons: Mapping[str, Changes] = field(default_factory=dict)
    """Of layers under treatment: the loss with the gate from before."""
    task_solved: bool | None = None
    """What the task metric says; None: nothing."""

    def is_low(self, layer: str) -> bool:
        """Return whether a layer is in one of the conditions that a treatment is to end."""
        return self.conditions.get(layer) in LOW

    def is_treatable(self, layer: str) -> bool:
        """Return whether a layer has collapsed, or may have: it is unused, and the task is unsolved."""
        return self.is_low(layer) and (self.conditions[layer] == "collapsed" or self.task_solved is False)

    def why_withheld(self, layer: str) -> str:
        """Return why a layer must not be treated, or an empty string."""
        if self.evidence is None:
            return ""
        found = self.evidence.get(layer)
        if found is not None and found.basis == "loss":
            return ""
        compared = "there is no evidence on it" if found is None else "only its outputs could be compared"
        return f"{compared}, and nothing but the loss allows a treatment; give Monitor.step a replay="

    def is_silent(self, layer: str) -> bool:
        """Return whether nothing that a layer remembers reaches the loss."""
        return self.evidence is not None and layer in self.evidence and self.evidence[layer].outcome == "silent"
