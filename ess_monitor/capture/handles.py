"""What an intervention may act on: found by the capture room, used by the interventions.

A handle says where in a layer something is, never what to do with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ess_monitor.capture.hooks.call_site import Arguments, Call, CallSite


@dataclass(frozen=True)
class Transition:
    """The transition matrices of a layer, A_t = diag(exp log_decay_t) + left_t right_t^T, with their graph."""

    log_decay: torch.Tensor
    """(batch, heads, length, state), any of them 1 where it broadcasts."""
    left: torch.Tensor | None = None
    """(batch, heads, length, state) or None: no rank-one part."""
    right: torch.Tensor | None = None
    state_size: int | None = None
    """State dimensions that a decay of state size 1 stands for; None: as many as the tensors show."""


@dataclass(frozen=True)
class DecayInputs:
    """The tensors that determine A in one call, all of them, and how they do."""

    tensors: tuple[torch.Tensor, ...]
    transition: Callable[[tuple[torch.Tensor, ...]], Transition]
    """A from the tensors, differentiable. It is also called with a part of the sequence."""
    length_dims: tuple[int | None, ...] = (2,)
    """For each tensor the dimension that runs along the sequence, None where there is none. Long sequences are worked
    through in parts, so that A is never held for all positions at once."""


@dataclass(frozen=True)
class DecayHandle:
    """The place where everything that determines a layer's A enters its recurrence.

    Gradients added to the tensors that `read` finds there reach every parameter behind A: gate projections, biases,
    A_log.
    """

    parameters: tuple[str, ...]
    """What determines the decay, for `describe`: names below the layer."""
    site: CallSite
    """The call that takes the tensors as arguments."""
    read: Callable[[Call], DecayInputs | None]
    """What is behind A in a call; None for a call without (a step of cached decoding)."""
    write: Callable[[Call, tuple[torch.Tensor, ...]], Arguments]
    """The arguments of the call with other tensors in place of those that `read` gave. Parameters that the layer uses
    by itself cannot be put into a call and stay as they are. Their gradients are exact all the same: it is enough that
    one of the tensors goes on."""


@dataclass(frozen=True)
class AlphaHandle:
    """What scales the whole log-decay: log A = -rate(t) * (what the input decides), of a parameter or buffer t; or a
    plain number that log A is divided by."""

    tensor: str
    """Its name below the layer."""
    sign: float = 1.0
    """+1: raising the tensor raises the decay rate (A_log). -1: it lowers the rate (log alpha)."""
    form: Literal["exp", "softplus", "divisor"] = "exp"
    """What makes a rate of sign * t. divisor: a number, an attribute of the layer, whose inverse is the rate."""

    @property
    def is_number(self) -> bool:
        """True for an attribute that is no tensor: it is not trained, and in no state_dict."""
        return self.form == "divisor"

    def of(self, layer: nn.Module) -> torch.Tensor:
        """The tensor itself; of a number one that holds it, in float64 or int64."""
        owner, name = self._place(layer)
        found: torch.Tensor | float = getattr(owner, name)
        if isinstance(found, torch.Tensor):
            return found
        return torch.tensor(found, dtype=torch.float64 if isinstance(found, float) else torch.int64)

    def put(self, layer: nn.Module, value: torch.Tensor) -> None:
        """Write the value in place."""
        if self.is_number:
            owner, name = self._place(layer)
            setattr(owner, name, value.item())
        else:
            with torch.no_grad():
                self.of(layer).copy_(value)

    def _place(self, layer: nn.Module) -> tuple[nn.Module, str]:
        owner, _, name = self.tensor.rpartition(".")
        return layer.get_submodule(owner), name

    def divided(self, tensor: torch.Tensor, factor: float) -> torch.Tensor:
        """What the tensor has to be for a rate that is smaller by `factor`."""
        if self.form == "divisor":
            return tensor.double() * factor
        if self.form == "exp":
            return tensor - self.sign * math.log(factor)
        rate = nn.functional.softplus(self.sign * tensor.double()) / factor
        return (self.sign * (rate + (-torch.expm1(-rate)).log())).to(tensor.dtype)  # softplus, inverted


def positional(index: int, path: str, parameters: tuple[str, ...]) -> DecayHandle:
    """A log-decay that is the positional argument `index` of the call of the sub-module at `path`."""

    def write(call: Call, tensors: tuple[torch.Tensor, ...]) -> Arguments:
        return (*call.args[:index], tensors[0], *call.args[index + 1 :]), call.kwargs

    return DecayHandle(
        parameters,
        CallSite(path),
        read=lambda call: DecayInputs((call.args[index],), lambda tensors: Transition(tensors[0])),
        write=write,
    )


def under_names(*names: str) -> Callable[[Call, tuple[torch.Tensor, ...]], Arguments]:
    """`DecayHandle.write` for tensors that are arguments of an op under these names; None-valued ones are left out."""

    def write(call: Call, tensors: tuple[torch.Tensor, ...]) -> Arguments:
        given = [name for name in names if call.kwargs.get(name) is not None]
        return call.args, {**call.kwargs, **dict(zip(given, tensors, strict=True))}

    return write
