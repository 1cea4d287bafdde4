"""The remedies that the autopilot has, in order of preference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from ess_monitor import validation
from ess_monitor.capture import AlphaHandle, Layer
from ess_monitor.errors import CheckpointError, ConfigError
from ess_monitor.interventions.alpha import (
    AlphaCopy,
    Optimizers,
    is_persistent,
    is_sharded,
    rescale_alpha,
    restore_alpha,
)
from ess_monitor.interventions.config import AutopilotConfig
from ess_monitor.interventions.identity_pull import IdentityPull
from ess_monitor.interventions.remedy import Remedy, RemedyState


class AlphaCopyState(BaseModel):
    """Validates the saved copy of an alpha."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True, hide_input_in_errors=True)

    tensor: torch.Tensor
    moments: dict[str, Any]


class RescaleAlphaState(RemedyState):
    """Validates the state of `RescaleAlpha`."""

    factor: FiniteFloat | None = Field(default=None, gt=0)
    number: FiniteFloat | None = Field(default=None, gt=0)
    copy_before: AlphaCopyState | None = Field(alias="copy")


class RescaleAlpha(Remedy):
    """Multiplies a layer's alpha, which divides log A; the changed alpha stays after a recovery.

    A layer with an alpha is stuck in its arange, and rescaling helps where it stands.
    """

    name = "rescale_alpha"
    subject = "alpha"
    is_permanent = True
    State = RescaleAlphaState

    _copy: AlphaCopy | None = None
    """Alpha before the first rung."""
    _is_copy_sharded = False
    """Whether the copy is this rank's shard: usable in this process, and not saved."""
    _factor: float | None = 1.0
    """What alpha has been multiplied with, over all rungs; None if the loaded state does not say."""
    _has_begun = False

    @classmethod
    def match(cls, layer: Layer) -> bool:
        return layer.spec.alpha is not None

    @classmethod
    def is_second_choice(cls, layer: Layer) -> bool:
        """Return whether alpha is a plain number: it is not saved with the weights, and a later run would lose it."""
        return layer.spec.alpha is not None and layer.spec.alpha.is_number

    @classmethod
    def obstacle(cls, layer: Layer) -> str:
        """Return why alpha cannot be changed in place, or an empty string."""
        alpha = layer.spec.alpha
        if alpha is None or alpha.is_number or is_persistent(layer.module, alpha.of(layer.module)):
            return ""
        return (
            f"{alpha.tensor} is not a parameter or buffer here, so it cannot be rescaled; under FSDP with "
            "use_orig_params=False set it to True"
        )

    @classmethod
    def strengths(cls, config: AutopilotConfig) -> tuple[float, ...]:
        return config.alpha_factors

    @classmethod
    def describe(cls, strength: float) -> str:
        return f"alpha multiplied by {strength:g}, the optimizer's memory of it cleared"

    def apply(self, strength: float, optimizer: Optimizers) -> None:
        copy = rescale_alpha(self.layer.module, strength, optimizer=optimizer, handle=self._handle)
        if not self._has_begun:
            self._copy, self._is_copy_sharded = copy, is_sharded(self._tensor)
        self._has_begun = True
        self._factor = None if self._factor is None else self._factor * strength

    def undo(self, optimizer: Optimizers) -> None:
        """Restore alpha bit for bit from the copy, or divide it by the factor if there is no copy that fits.

        Dividing is exact up to rounding in alpha's dtype. It keeps what training has changed since the first rung, and
        clears the optimizer's memory of alpha.
        """
        if self._copy is not None and (self._is_copy_sharded or self._fits(self._copy.tensor)):
            restore_alpha(self.layer.module, self._copy, optimizer=optimizer, handle=self._handle)
        elif self._factor is not None:
            rescale_alpha(self.layer.module, 1 / self._factor, optimizer=optimizer, handle=self._handle)
        else:
            raise CheckpointError("the state that was resumed from has no copy of this alpha, and no factor")

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and whole tensors.

        Of a sharded alpha only the factor is saved, which is the same on all ranks. A number is saved as it is now,
        because the model's own state does not have it.
        """
        copy = None if self._is_copy_sharded else self._copy
        state: dict[str, Any] = {"copy": None if copy is None else {"tensor": copy.tensor, "moments": copy.moments}}
        if self._factor is not None:
            state["factor"] = self._factor
        if self._handle.is_number:
            state["number"] = float(self._tensor)
        return state

    def resume(self, strength: float, state: RescaleAlphaState) -> None:
        """Take over the copy and the factor; the loaded weights hold the changed alpha, a number is set again."""
        self._has_begun = True
        self._factor = state.factor
        if state.copy_before is not None and not is_sharded(state.copy_before.tensor):
            self._copy = AlphaCopy(state.copy_before.tensor, dict(state.copy_before.moments))
        if state.number is not None and self._handle.is_number:
            self._handle.put(self.layer.module, torch.tensor(state.number, dtype=torch.float64))

    @property
    def _handle(self) -> AlphaHandle:
        assert self.layer.spec.alpha is not None, "match is false for this layer"
        return self.layer.spec.alpha

    @property
    def _tensor(self) -> torch.Tensor:
        return self._handle.of(self.layer.module)

    def _fits(self, tensor: torch.Tensor) -> bool:
        """Return whether a saved copy, which is always of a whole alpha, can be laid over the present one."""
        return self._tensor.shape == tensor.shape and not is_sharded(self._tensor)


class PullToIdentity(Remedy):
    """Attaches the A->I regularizer to a layer until it has recovered."""

    name = "pull_to_identity"
    subject = "regularizer"
    State = RescaleAlphaState  # state version 1 has the same keys for both; a pull ignores their values

    _pull: IdentityPull | None = None

    @classmethod
    def match(cls, layer: Layer) -> bool:
        return layer.spec.decay is not None

    @classmethod
    def strengths(cls, config: AutopilotConfig) -> tuple[float, ...]:
        return config.strengths

    @classmethod
    def describe(cls, strength: float) -> str:
        return f"A->I regularizer with lambda {strength:g} attached"

    def apply(self, strength: float, optimizer: Optimizers) -> None:
        self.detach()
        handle = self.layer.spec.decay
        assert handle is not None, "match is false for this layer"
        self._pull = IdentityPull(
            self.layer.module, handle, strength, grad_scale=self.grad_scale, on_failure=self._on_pull_failure
        )
        self._pull.attach()

    def undo(self, optimizer: Optimizers) -> None:
        """Detach; what training has learned under the regularizer stays."""
        self.detach()

    def detach(self) -> None:
        if self._pull is not None:
            self._pull.detach()
            self._pull = None

    @property
    def failure(self) -> Exception | None:
        return None if self._pull is None else self._pull.failure

    def resume(self, strength: float, state: RemedyState) -> None:
        self.apply(strength, None)

    def _on_pull_failure(self, error: Exception) -> None:
        self.report_failure(f"the {self.subject}", error)


REMEDIES: tuple[type[Remedy], ...] = (RescaleAlpha, PullToIdentity)
"""Remedies in order of preference: the first that matches a layer treats it."""


def choose_remedy(layer: Layer, remedies: Iterable[type[Remedy]] = REMEDIES) -> type[Remedy] | None:
    """Return the first remedy that matches the layer, a second choice only if nothing else does."""
    matching = [remedy for remedy in remedies if remedy.match(layer)]
    return min(matching, key=lambda remedy: remedy.is_second_choice(layer), default=None)


def check_remedies(remedies: Iterable[type[Remedy]]) -> tuple[type[Remedy], ...]:
    """Return the remedies as a tuple, or raise `ConfigError` unless they are classes with a name each."""
    given = validation.listed("remedies", remedies, hint="subclasses of Remedy")
    for remedy in given:
        if not (isinstance(remedy, type) and issubclass(remedy, Remedy)):
            raise ConfigError(f"remedies holds {validation.type_of(remedy)}; it must hold subclasses of Remedy")
    names = [remedy.name for remedy in given]
    if len(set(names)) < len(names):
        raise ConfigError(f"remedies: two of {', '.join(names)} have one name; give each its own")
    return given
