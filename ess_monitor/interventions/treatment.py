"""One layer under one remedy: what was applied, what it was before, and how it is taken back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from ess_monitor.capture import Layer
from ess_monitor.errors import CheckpointError, format_error
from ess_monitor.interventions.alpha import (
    AlphaCopy,
    Optimizers,
    is_persistent,
    is_sharded,
    rescale_alpha,
    restore_alpha,
)
from ess_monitor.interventions.identity_pull import IdentityPull
from ess_monitor.records import ActionOutcome, Reading

Remedy = Literal["pull_to_identity", "rescale_alpha"]
GradScale = Callable[[], "float | torch.Tensor"]
OnFailure = Callable[[str, Exception], None]
"""Is told what failed, in words, and the error."""


def remedy_of(layer: Layer) -> Remedy | None:
    """What a layer's handles allow. A layer with an alpha is stuck in its arange: rescaling it helps where it stands;
    one with a gate alone is pulled, and so is one whose alpha is a number, with which no weights are saved."""
    alpha, decay = layer.spec.alpha, layer.spec.decay
    if alpha is not None and not (alpha.is_number and decay is not None):
        return "rescale_alpha"
    return "pull_to_identity" if decay is not None else None


def can_be_treated(layer: Layer | None, action: Remedy) -> bool:
    """Whether the layer is there and has the handle that the action needs."""
    if layer is None:
        return False
    return (layer.spec.alpha if action == "rescale_alpha" else layer.spec.decay) is not None


def obstacle(layer: Layer, remedy: Remedy | None) -> str:
    """Why the layer cannot be treated, in words, or nothing."""
    if remedy is None:
        return f"{layer.spec.operator} of this layer has no handle on its decay"
    alpha = layer.spec.alpha
    if remedy != "rescale_alpha" or alpha is None or alpha.is_number:
        return ""
    if not is_persistent(layer.module, alpha.of(layer.module)):
        return (
            f"{alpha.tensor} is no parameter or buffer here (FSDP with use_orig_params=False?), it cannot be rescaled"
        )
    return ""


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
    factor: FiniteFloat | None = Field(default=None, gt=0)
    number: FiniteFloat | None = Field(default=None, gt=0)
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
        """Before the first rung."""
        self._copy_is_part = False
        """Of a sharded alpha the copy is this rank's part: good in this process, and not saved."""
        self._factor: float | None = 1.0
        """By which alpha has been multiplied, over all rungs; None if the state did not say."""

    @property
    def description(self) -> str:
        """What was applied, in words."""
        if self.action == "rescale_alpha":
            return f"alpha multiplied by {self.strength:g}, the optimizer's memory of it cleared"
        return f"A->I regularizer with lambda {self.strength:g} attached"

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
        """Leave the forward pass where the regularizer has failed in it, or behind it; the error, or nothing.

        The next rung attaches a new one.
        """
        error = None if self._pull is None else self._pull.failure
        if error is None:
            return ""
        self.lift()
        return format_error(error)

    def lift(self) -> None:
        """Leave the forward pass; a rescaled alpha stays."""
        if self._pull is not None:
            self._pull.detach()
            self._pull = None

    def take_back(self, optimizer: Optimizers) -> tuple[ActionOutcome, str]:
        """Undo everything, and tell how that ended: it never raises."""
        try:
            self._undo(optimizer)
        except Exception as error:
            self._on_failure(f"taking back {self.action} on {self.layer.name}: {format_error(error)}", error)
            return "failed", f"it could not be taken back ({format_error(error)}), a person must look"
        return "rolled_back", "taken back"

    def _undo(self, optimizer: Optimizers) -> None:
        """From the copy bit for bit. Without one by the factor: up to rounding in alpha's dtype, with what training has
        changed since then, and the optimizer's memory of it cleared."""
        self.lift()
        if self.action != "rescale_alpha":
            return
        module, handle = self.layer.module, self.layer.spec.alpha
        if self._copy is not None and (self._copy_is_part or self._fits(self._copy.tensor)):
            restore_alpha(module, self._copy, optimizer=optimizer, handle=handle)
        elif self._factor is not None:
            rescale_alpha(module, 1 / self._factor, optimizer=optimizer, handle=handle)
        else:
            raise CheckpointError("the state that was resumed from has no copy of this alpha, and no factor")

    def _apply(self, step: int, strength: float, optimizer: Optimizers) -> None:
        self.step, self.strength = step, strength
        if self.action == "rescale_alpha":
            handle = self.layer.spec.alpha
            copy = rescale_alpha(self.layer.module, strength, optimizer=optimizer, handle=handle)
            if self.rung == 0:  # roll-back goes to the very beginning
                self._copy, self._copy_is_part = copy, handle is not None and is_sharded(handle.of(self.layer.module))
            self._factor = None if self._factor is None else self._factor * strength
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
        self._on_failure(f"the regularizer on {self.layer.name}: {format_error(error)}", error)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and whole tensors: of a sharded alpha the factor alone, which is the same on all ranks."""
        copy = None if self._copy_is_part else self._copy
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
            **({} if self._factor is None else {"factor": self._factor}),
            **({} if self._number is None else {"number": self._number}),
        }

    @property
    def _number(self) -> float | None:
        """What alpha is now, where it is a number: the model's own state does not have it."""
        alpha = self.layer.spec.alpha
        if self.action != "rescale_alpha" or alpha is None or not alpha.is_number:
            return None
        return float(alpha.of(self.layer.module))

    def _fits(self, tensor: torch.Tensor) -> bool:
        """Whether a saved copy, which is of a whole alpha, is one of what is here."""
        if self.layer.spec.alpha is None:
            return False
        alpha = self.layer.spec.alpha.of(self.layer.module)
        return alpha.shape == tensor.shape and not is_sharded(alpha)

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
        treatment._factor = state.factor
        if state.copy_before is not None and not is_sharded(state.copy_before.tensor):
            treatment._copy = AlphaCopy(state.copy_before.tensor, dict(state.copy_before.moments))
        if state.number is not None and treatment._number is not None and layer.spec.alpha is not None:
            layer.spec.alpha.put(layer.module, torch.tensor(state.number, dtype=torch.float64))
        if treatment.action == "pull_to_identity":
            treatment._attach()
        return treatment
