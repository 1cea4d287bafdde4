"""Handles on a layer's decay: where an intervention can act. Capture finds them, interventions use them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
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
    """All tensors that determine A in one call, and the function that computes A from them."""

    tensors: tuple[torch.Tensor, ...]
    transition: Callable[[tuple[torch.Tensor, ...]], Transition]
    """A from the tensors, differentiable. It is also called with a part of the sequence. It must not refer to tensors
    of the call, which would keep them in memory after backward has freed them."""
    length_dims: tuple[int | None, ...] = (2,)
    """For each tensor the dimension that runs along the sequence, or None. Long sequences are processed in parts, so
    that A is never held for all positions at once."""


@dataclass(frozen=True)
class DecayHandle:
    """The call that the tensors which determine a layer's A pass through.

    Gradients added to the tensors that `read` finds there reach every parameter that A depends on: gate projections,
    biases, A_log.
    """

    parameters: tuple[str, ...]
    """Names, below the layer, of what determines the decay; shown by `describe`."""
    site: CallSite
    """The call that takes the tensors as arguments."""
    read: Callable[[Call], DecayInputs | None]
    """The inputs of A in a call; None for a call without any (a step of cached decoding)."""
    write: Callable[[Call, tuple[torch.Tensor, ...]], Arguments]
    """The arguments of the call with other tensors in place of those that `read` gave. Parameters that the layer uses
    by itself are no arguments and stay as they are. Their gradients are exact all the same: it is enough that one of
    the tensors is replaced."""
    raised: Callable[[Call, float], Arguments | None] | None = None
    """The arguments of the call with A^power in place of A: log A times the power, and `math.inf` is A = 0. It returns
    None for a call that `read` gives None for. None where A is not determined by arguments alone."""


@dataclass(frozen=True)
class AlphaHandle:
    """The parameter, buffer or number t that scales the whole log-decay: log A = -rate(t) * (a function of the input).

    A plain number is what log A is divided by.
    """

    tensor: str
    """Its name below the layer."""
    sign: float = 1.0
    """+1: raising the tensor raises the decay rate (A_log). -1: it lowers the rate (log alpha)."""
    form: Literal["exp", "softplus", "divisor"] = "exp"
    """How the rate follows from sign * t. divisor: t is a number, an attribute of the layer, and the rate is 1 / t."""

    @property
    def is_number(self) -> bool:
        """True for an attribute that is not a tensor: it is not trained, and in no state_dict."""
        return self.form == "divisor"

    def of(self, layer: nn.Module) -> torch.Tensor:
        """Return the tensor itself; a number as a float64 or int64 tensor."""
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
        """Return the tensor of a rate that is smaller by `factor`."""
        if self.form == "divisor":
            return tensor.double() * factor
        if self.form == "exp":
            return tensor - self.sign * math.log(factor)
        rate = nn.functional.softplus(self.sign * tensor.double()) / factor
        return (self.sign * (rate + (-torch.expm1(-rate)).log())).to(tensor.dtype)  # the inverse of softplus


def named_inputs(
    inputs: Mapping[str, tuple[torch.Tensor | None, int | None]],
    transition: Callable[[dict[str, torch.Tensor]], Transition],
) -> DecayInputs:
    """Build the inputs of a transition that takes them by name.

    `inputs` has a tensor, and its dimension that runs along the sequence, under each name. None is left out.
    """
    given = {name: (tensor, dim) for name, (tensor, dim) in inputs.items() if tensor is not None}
    names = tuple(given)
    return DecayInputs(
        tuple(tensor for tensor, _ in given.values()),
        lambda tensors: transition(dict(zip(names, tensors, strict=True))),
        tuple(dim for _, dim in given.values()),
    )


def write_arguments(names: Callable[[Call], Iterable[str]]) -> Callable[[Call, tuple[torch.Tensor, ...]], Arguments]:
    """Build a `DecayHandle.write` that replaces the arguments of an op under `names`, in the order of `read`.

    Arguments that are None are left out. Tensors that `read` gave beyond the arguments are not written.
    """

    def write(call: Call, tensors: tuple[torch.Tensor, ...]) -> Arguments:
        given = [name for name in names(call) if call.kwargs.get(name) is not None]
        return call.args, {**call.kwargs, **dict(zip(given, tensors, strict=False))}

    return write
