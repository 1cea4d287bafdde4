"""A treatment on probation: it stays only while the loss does not speak against it, and only if it gains something.

At a few steps of the trial the same batches are run with the present gate and with the gate from before the treatment,
the rest of the model as it is now. A healthy gate that was pulled away from where the loss wants it is worse within 25
steps. A collapsed one shows no difference for some hundred steps and a large one after the escape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from ess_monitor.capture import Layer
from ess_monitor.interventions.alpha import Optimizers
from ess_monitor.interventions.gate import GateCopy
from ess_monitor.records import Changes
from ess_monitor.validation.settings import Settings


class ProbationConfig(Settings):
    """Sets when a treatment is compared with the gate from before it, and what ends it.

    Examples:
        >>> ProbationConfig().checks
        (25, 100, 400, 1000)
    """

    model_config = ConfigDict(allow_inf_nan=False)

    checks: tuple[int, ...] = Field(default=(25, 100, 400, 1000), min_length=1)
    """Steps after the beginning at which the gates are compared, on `evidence.batches` batches, two forward passes
    each. 25 is where a swapped gate first tells healthy from collapsed (3 errors in 32)."""
    harm_until: int = Field(default=100, ge=1)
    """Steps until which a treatment that makes the loss worse is taken back. Later the rest of the model has adapted to
    the present gate, and the gate from before would lose in any case."""
    harm_ratio: float = Field(default=2e-5, ge=0)
    """By how much of the loss the gate from before must be better. Collapsed layers are at -.0014 to 3e-6 after 25
    steps, healthy ones at -.0002 to .001."""
    gain_ratio: float = Field(default=1e-3, ge=0)
    """By how much of the loss the present gate must be better to count as a gain. A rescue is worth half the loss."""
    patience_steps: int = Field(default=400, ge=1)
    """Steps after which a treatment of a layer that reaches the loss is taken back without a gain. Rescues first show
    after 159 to 338 steps."""
    silent_patience_steps: int = Field(default=1000, ge=1)
    """The same for a layer of which nothing reached the loss: the rest of the model has to learn to read it first."""
    noise: float = Field(default=2.0, ge=0)
    """Standard errors over the batches by which harm and gain must differ from 0."""

    @model_validator(mode="after")
    def _checks_rise(self) -> ProbationConfig:
        if list(self.checks) != sorted(set(self.checks)) or self.checks[0] < 1:
            raise ValueError(f"checks={self.checks} must be steps above 0 that rise, for example (25, 100, 400, 1000)")
        return self


Verdict = Literal["open", "harm", "no_gain", "gain"]


class TrialState(BaseModel):
    """Validates `Trial.state_dict`."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True, hide_input_in_errors=True)

    gate: dict[str, Any] | None
    is_silent: bool
    check: int = Field(ge=0, le=2**63 - 1)
    compared: bool
    has_gained: bool
    last_gain_ratio: FiniteFloat | None


@dataclass
class Trial:
    """Follows one treatment from its beginning to a gain, or to the end of its probation."""

    gate: GateCopy | None
    """The gate from before; None once it is not needed, and where it was lost in a resume."""
    is_silent: bool
    """Whether nothing of the layer reached the loss."""
    check: int = 0
    """The comparison that is under way or was the last, by its step of the trial; 0 before the first."""
    compared: bool = True
    """False while it is under way."""
    has_gained: bool = False
    last_gain_ratio: float | None = None
    """By how much of the loss the present gate was better at the last comparison."""

    @classmethod
    def begin_on(cls, layer: Layer, optimizer: Optimizers, *, is_silent: bool) -> Trial:
        """Begin the trial of a treatment of `layer`, before anything is changed."""
        gate = GateCopy.take(layer, optimizer)
        return cls(None if gate.is_empty else gate, is_silent)

    def due_in(self, age: int, config: ProbationConfig) -> int | None:
        """Return in how many steps the next comparison begins, at `age` steps of the trial; None without another."""
        if self.gate is None or self.has_gained:
            return None
        left = [check for check in config.checks if check > self.check or (check == self.check and not self.compared)]
        return max(0, left[0] - age) if left else None

    def begin(self, config: ProbationConfig) -> None:
        """Note that the next comparison is asked for."""
        if self.compared:
            self.check = next(check for check in config.checks if check > self.check)
        self.compared = False

    def judge(self, age: int, changes: Changes | None, config: ProbationConfig) -> Verdict:
        """Return what the trial comes to at `age` steps, given a comparison if there was one."""
        if self.has_gained:
            return "gain"
        if changes is not None:
            self.compared = True
        if changes is not None and changes.batches and changes.kind == "trial":
            count, scale = changes.batches, abs(changes.base / changes.batches)
            gain = changes.first / count
            self.last_gain_ratio = gain / scale if scale else math.copysign(0.0, gain)
            beyond_noise = abs(gain) > config.noise * changes.first_error
            if gain < 0 and -gain > config.harm_ratio * scale and beyond_noise and self.check <= config.harm_until:
                return "harm"
            if gain > config.gain_ratio * scale and beyond_noise and self.check > config.harm_until:
                self.settle()
                return "gain"
        patience = config.silent_patience_steps if self.is_silent else config.patience_steps
        last = max((check for check in config.checks if check <= patience), default=config.checks[0])
        is_over = age >= patience and self.compared and (self.check >= last or self.gate is None)
        return "no_gain" if is_over else "open"

    def settle(self) -> None:
        """End the probation: the treatment stays until it is released."""
        self.has_gained, self.gate = True, None

    def restore_gate(self, optimizer: Optimizers) -> None:
        """Put the gate from before back, with the optimizer's memory of it. Nothing happens after `settle`."""
        if self.gate is not None:
            self.gate.restore(optimizer)

    def describe(self) -> str:
        """Return what the last comparison showed, in words."""
        gain = self.last_gain_ratio
        if gain is None:
            return "the gate could not be compared with the one from before, and no gain was seen"
        if gain < 0:
            return f"the loss would be {-gain:.3%} lower with the gate from before"
        return f"the loss is only {gain:.3%} lower than with the gate from before"

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors, for a checkpoint."""
        return {
            "gate": None if self.gate is None else self.gate.state_dict(),
            "is_silent": self.is_silent,
            "check": self.check,
            "compared": self.compared,
            "has_gained": self.has_gained,
            "last_gain_ratio": self.last_gain_ratio,
        }

    @classmethod
    def from_state(cls, layer: Layer, state: TrialState) -> Trial:
        """Return the trial as it was. Without its gate, whose parts (FSDP1) are not saved, it can only end in time."""
        gate = GateCopy.from_state(layer, state.gate)
        compared = state.compared or gate is None
        return cls(gate, state.is_silent, state.check, compared, state.has_gained, state.last_gain_ratio)
