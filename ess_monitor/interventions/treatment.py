"""The course of a remedy on one layer, whatever the remedy is."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from ess_monitor.capture import Layer
from ess_monitor.errors import format_error
from ess_monitor.interventions.alpha import Optimizers
from ess_monitor.interventions.probation import Trial, TrialState
from ess_monitor.interventions.remedy import Remedy
from ess_monitor.records import Action, ActionKind, ActionOutcome, Reading


class TreatmentState(BaseModel):
    """Validates `Treatment.state_dict`. The remedy's own keys are extra here; `Remedy.State` validates them.

    A value of another type would raise only later, inside a backward pass.
    """

    model_config = ConfigDict(frozen=True, extra="allow", hide_input_in_errors=True)

    layer: str
    action: str
    finding: str
    rung: int = Field(ge=0, le=2**63 - 1)
    strength: FiniteFloat = Field(gt=0)
    step: int = Field(ge=0, le=2**63 - 1)
    first_step: int = Field(ge=0, le=2**63 - 1)
    recovered_step: int | None = Field(ge=0, le=2**63 - 1)
    loss_at_start: FiniteFloat | None
    utilization_before: FiniteFloat | None
    retention_before: FiniteFloat | None
    trial: TrialState | None = None


_NOT_CARRIED_OVER = ("layer", "action", "finding", "trial")
_CARRIED_OVER = tuple(name for name in TreatmentState.model_fields if name not in _NOT_CARRIED_OVER)
"""Attributes of a treatment that its state holds under the same name."""


class Treatment:
    """Tracks a remedy on a layer, from its first rung to recovery, failure or roll-back."""

    def __init__(self, remedy: Remedy, finding: str, reading: Reading | None) -> None:
        self.remedy = remedy
        self.finding = finding
        self.rung = 0
        self.strength = 0.0
        self.step = 0
        """When the present rung was applied."""
        self.first_step = 0
        self.recovered_step: int | None = None
        self.trial: Trial | None = None
        """Its probation; None where it stays without one."""
        self.loss_at_start: float | None = None
        self.utilization_before = None if reading is None else reading.utilization_ratio
        self.retention_before = None if reading is None else reading.retention_ratio

    @property
    def layer(self) -> Layer:
        """The treated layer."""
        return self.remedy.layer

    @property
    def action(self) -> ActionKind:
        """The remedy's name."""
        return self.remedy.name

    @property
    def has_gained(self) -> bool:
        """Whether it may go on, up or to its release: the loss or the task has gained, or no trial was asked for."""
        return self.trial is None or self.trial.has_gained

    def start(self, step: int, strength: float, loss: float | None, optimizer: Optimizers) -> None:
        """Apply the first rung."""
        self.first_step, self.loss_at_start = step, loss
        self._apply(step, strength, optimizer)

    def climb(self, step: int, strength: float, loss: float | None, optimizer: Optimizers) -> None:
        """Apply the next rung."""
        self.rung += 1
        self.loss_at_start = loss if self.loss_at_start is None else self.loss_at_start
        self._apply(step, strength, optimizer)

    def _apply(self, step: int, strength: float, optimizer: Optimizers) -> None:
        self.step, self.strength = step, strength
        self.remedy.apply(strength, optimizer)

    def roll_back(self, optimizer: Optimizers) -> tuple[ActionOutcome, str]:
        """Undo the remedy without raising; return how that ended, as an outcome and in words."""
        try:
            self.remedy.undo(optimizer)
            if self.trial is not None:
                self.trial.restore_gate(optimizer)
        except Exception as error:
            self.remedy.report_failure(f"undoing {self.action}", error)
            reason = format_error(error)
            return (
                "failed",
                f"{self.action} could not be undone ({reason}) and is not tried again; inspect the layer by hand",
            )
        return "rolled_back", f"{self.action} undone, and not tried again"

    def to_action(self, step: int, outcome: ActionOutcome, message: str, reading: Reading | None = None) -> Action:
        """Return the record of what happened, with `reading` as its effect."""
        return Action(
            step=step,
            layer=self.layer.name,
            action=self.action,
            outcome=outcome,
            finding=self.finding,
            message=message,
            strength=self.strength,
            utilization_before=self.utilization_before,
            utilization_after=None if reading is None else reading.utilization_ratio,
            retention_before=self.retention_before,
            retention_after=None if reading is None else reading.retention_ratio,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and whole tensors: the treatment's own, and the remedy's."""
        return {
            "layer": self.layer.name,
            "action": self.action,
            "finding": self.finding,
            **{name: getattr(self, name) for name in _CARRIED_OVER},
            "trial": None if self.trial is None else self.trial.state_dict(),
            **self.remedy.state_dict(),
        }

    @classmethod
    def from_state(cls, remedy: Remedy, state: TreatmentState, remedy_state: Any) -> Treatment:
        """Return the treatment as it was, with its remedy resumed."""
        treatment = cls(remedy, state.finding, None)
        for name in _CARRIED_OVER:
            setattr(treatment, name, getattr(state, name))
        if state.trial is not None:
            treatment.trial = Trial.from_state(remedy.layer, state.trial)
        remedy.resume(state.strength, remedy_state)
        return treatment
