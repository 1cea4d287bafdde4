"""One layer under one remedy: what was applied, what it was before, and how it is taken back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from ess_monitor.capture import Layer
from ess_monitor.errors import described
from ess_monitor.interventions.alpha import AlphaCopy, Optimizers, rescale_alpha, restore_alpha
from ess_monitor.interventions.regulariser import IdentityPull
from ess_monitor.records import Reading

Remedy = Literal["pull_to_identity", "rescale_alpha"]
GradScale = Callable[[], "float | torch.Tensor"]
OnFailure = Callable[[str, Exception], None]
"""Is told what failed, in words, and the error."""


def remedy_of(layer: Layer) -> Remedy | None:
    """What a layer's handles allow. A layer with an alpha is stuck in its arange: rescaling it helps where it stands;
    one with a gate alone is pulled."""
    if layer.spec.alpha is not None:
        return "rescale_alpha"
    return "pull_to_identity" if layer.spec.decay is not None else None


def can_be_treated(layer: Layer | None, action: Remedy) -> bool:
    """Whether the layer is there and has the handle that the action needs."""
    if layer is None:
        return False
    return (layer.spec.alpha if action == "rescale_alpha" else layer.spec.decay) is not None


class CopyState(BaseModel):
    """What an alpha was before it was rescaled."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True, hide_input_in_errors=True)

    tensor: torch.Tensor
    moments: dict[str, Any]


class TreatmentState(BaseModel):
    """`Treatment.state_dict` with its types: a strength of another one would fail inside the backward pass."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    layer: str
    action: Remedy
    finding: str
    rung: int = Field(ge=0, le=2**63 - 1)
    strength: FiniteFloat = Field(gt=0)
    step: int = Field(ge=0, le=2**63 - 1)
    first_step: int = Field(ge=0, le=2**63 - 1)
    recovered_step: int | None = Field(ge=0, le=2**63 - 1)
    loss_at_start: FiniteFloat | None
    utilization_before: FiniteFloat | None
    retention_before: FiniteFloat | None
    copy_before: CopyState | None = Field(alias="copy")


class Treatment:
    """A remedy on a layer, from its first rung to recovery, failure or roll-back."""

    def __init__(
        self,
        layer: Layer,
        action: Remedy,
        finding: str,
        reading: Reading | None,
        scale: GradScale,
        on_failure: OnFailure = lambda message, error: None,
    ) -> None:
        self.layer = layer
        self.action: Remedy = action
        self.finding = finding
        self.rung = 0
        self.strength = 0.0
        self.step = 0
        """When the present rung was applied."""
        self.first_step = 0
        self.recovered_step: int | None = None
        self.loss_at_start: float | None = None
        self.utilization_before = None if reading is None else reading.utilization_ratio
        self.retention_before = None if reading is None else reading.retention_ratio
        self._scale = scale
        self._on_failure = on_failure
        self._pull: IdentityPull | None = None
        self._copy: AlphaCopy | None = None

    @property
    def described(self) -> str:
        """What was applied, in words."""
        if self.action == "rescale_alpha":
            return f"alpha multiplied by {self.strength:g}, the optimizer's memory of it cleared"
        return f"A->I regulariser with lambda {self.strength:g} attached"

    def start(self, step: int, strength: float, loss: float | None, optimizer: Optimizers) -> None:
        """Apply the first rung."""
        self.first_step, self.loss_at_start = step, loss
        self._apply(step, strength, optimizer)

    def climb(self, step: int, strength: float, loss: float | None, optimizer: Optimizers) -> None:
        """Apply the next rung."""
        self.rung += 1
        self.loss_at_start = loss if self.loss_at_start is None else self.loss_at_start
        self._apply(step, strength, optimizer)

    def lift_if_failed(self) -> str:
        """Leave the forward pass where the regulariser has failed in it, or behind it; the error, or nothing.

        The next rung attaches a new one.
        """
        error = None if self._pull is None else self._pull.failure
        if error is None:
            return ""
        self.lift()
        return described(error)

    def lift(self) -> None:
        """Leave the forward pass; a rescaled alpha stays."""
        if self._pull is not None:
            self._pull.detach()
            self._pull = None

    def undo(self, optimizer: Optimizers) -> None:
        """Take everything back."""
        self.lift()
        if self._copy is not None:
            restore_alpha(self.layer.module, self._copy, optimizer=optimizer, handle=self.layer.spec.alpha)

    def _apply(self, step: int, strength: float, optimizer: Optimizers) -> None:
        self.step, self.strength = step, strength
        if self.action == "rescale_alpha":
            handle = self.layer.spec.alpha
            copy = rescale_alpha(self.layer.module, strength, optimizer=optimizer, handle=handle)
            self._copy = self._copy or copy  # roll-back goes to the very beginning
        else:
            self._attach()

    def _attach(self) -> None:
        self.lift()
        handle = self.layer.spec.decay
        assert handle is not None, "a layer without a decay handle has no pull"
        self._pull = IdentityPull(
            self.layer.module, handle, self.strength, grad_scale=self._scale, on_failure=self._pull_failed
        )
        self._pull.attach()

    def _pull_failed(self, error: Exception) -> None:
        self._on_failure(f"the regulariser on {self.layer.name}: {described(error)}", error)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        copy = self._copy
        return {
            "layer": self.layer.name,
            "action": self.action,
            "finding": self.finding,
            "rung": self.rung,
            "strength": self.strength,
            "step": self.step,
            "first_step": self.first_step,
            "recovered_step": self.recovered_step,
            "loss_at_start": self.loss_at_start,
            "utilization_before": self.utilization_before,
            "retention_before": self.retention_before,
            "copy": None if copy is None else {"tensor": copy.tensor, "moments": copy.moments},
        }

    @classmethod
    def from_state(
        cls,
        layer: Layer,
        state: TreatmentState,
        scale: GradScale,
        on_failure: OnFailure = lambda message, error: None,
    ) -> Treatment:
        """The treatment as it was, attached again."""
        treatment = cls(layer, state.action, state.finding, None, scale, on_failure)
        for name in (
            "rung",
            "strength",
            "step",
            "first_step",
            "recovered_step",
            "loss_at_start",
            "utilization_before",
            "retention_before",
        ):
            setattr(treatment, name, getattr(state, name))
        if state.copy_before is not None:
            treatment._copy = AlphaCopy(state.copy_before.tensor, dict(state.copy_before.moments))
        if treatment.action == "pull_to_identity":
            treatment._attach()
        return treatment
