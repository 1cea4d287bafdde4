"""Handles on a layer: where its decay can be acted on, where its state can be made smaller, and in which weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ess_monitor.capture.hooks.call_site import Arguments, Call, CallSite

STRONGEST_LOG_DECAY = -30.0
"""Log decay of a token in place of that of A = 0: A is 1e-13. Kernels subtract sums of log decays, and -inf - (-inf)
would be NaN."""
STRONGEST_RATE = 1e8
"""Rate r in place of infinity, where log A = -r times a function of the input. That function is a step size, or a gate
in 0..1, either of which can be as small as 1e-6."""


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
    """The arguments of the call with A^power in place of A: log A times the power, and `math.inf` is A = 0, up to
    `STRONGEST_LOG_DECAY`. What is added to the state and read from it stays as it is. It returns None for a call
    without a decay, such as those that `read` gives None for. None where no argument determines the decay: the layer
    computes it by itself, or has none."""


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

    def raised(self, tensor: torch.Tensor, power: float) -> torch.Tensor:
        """Return the tensor of A^power: a rate that is larger by `power`, or `STRONGEST_RATE` for `math.inf`."""
        if not math.isinf(power):
            return self.divided(tensor, 1 / power)
        if self.form == "divisor":
            return tensor.double().clamp(max=1 / STRONGEST_RATE)
        rate = min(STRONGEST_RATE, torch.finfo(tensor.dtype).max)
        return self.sign * (self.sign * tensor).clamp(min=math.log(rate) if self.form == "exp" else rate)


@dataclass(frozen=True)
class StateHandle:
    """The call that everything passes through which enters a layer's state."""

    site: CallSite
    """The call that takes it as arguments."""
    reduced: Callable[[Call, float], Arguments | None]
    """The arguments of the call without a share of each head's state dimensions: nothing is written to these. None for
    a call of which no operator is read, such as a step of cached decoding."""


Role = Literal["writes", "reads", "decays"]
"""What rows of a weight compute: b_t, c_t or the decay."""


Keeps = Literal["directions", "dimensions", "first"]
"""What of a state can be kept: any directions (A = a I, b and c are linear in their rows), any dimensions, or only the
first ones (their decays follow from their numbers)."""


class StateRows(NamedTuple):
    """Where a parameter or buffer of a layer has state dimensions: blocks of them, one for each head, in a row."""

    tensor: str
    """Its name below the layer."""
    role: Role
    heads: int = 1
    """Number of blocks; 1 where the heads share one."""
    start: int = 0
    """Place of the first block along its dimension."""
    dim: int = 0
    has_head_dim: bool = False
    """True where the heads are a dimension of their own, `dim`, and the state is the next one."""


@dataclass(frozen=True)
class StateWeights:
    """The weights and sizes of a layer that follow from its state size n, to build the layer with a smaller one."""

    size: int
    """State dimensions per head, n."""
    groups: int
    """Of neighboring heads that must keep the same dimensions."""
    rows: tuple[StateRows, ...]
    attributes: Callable[[int], Mapping[str, Any]]
    """State size -> attributes below the layer, by dotted name, apart from those of linear layers and convolutions."""
    settings: Callable[[int], Mapping[str, int | float]]
    """State size -> arguments with which such a layer, or its model, is built."""
    keeps: Keeps = "dimensions"
    reads_linearly: bool = True
    """Whether c is linear in its rows, so that it can be scaled; not behind a convolution with an activation."""
    query_scale: Callable[[int], float] = lambda size: 1.0
    """State size -> the factor that the layer's code multiplies c with."""
    note: str = ""
    """What else is to be known of a smaller layer."""


class Axes(NamedTuple):
    """Where a tensor has its state dimensions and, in front of them, its heads."""

    state: int
    heads: int | None = None
    """None: all heads share the tensor."""

    def usage(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the root mean square over the other dimensions, (heads | 1, state)."""
        kept = [dim % tensor.dim() for dim in (self.state, self.heads) if dim is not None]
        exact = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
        others = [dim for dim in range(tensor.dim()) if dim not in kept]
        mean = exact.square().mean(others, keepdim=True).sqrt() if others else exact.abs()
        by_head = mean.movedim(self.state, -1)
        return by_head.reshape(-1, tensor.shape[self.state])

    def without(self, tensor: torch.Tensor, left_out: torch.Tensor) -> torch.Tensor:
        """Return the tensor with 0 where `left_out`, (heads | 1, state), is true."""
        shape = [1] * tensor.dim()
        if self.heads is not None:
            shape[self.heads] = left_out.shape[0]
        shape[self.state] = left_out.shape[1]
        return tensor.masked_fill(left_out.reshape(shape), 0.0)


def raised_log_decay(log_decay: torch.Tensor, power: float) -> torch.Tensor:
    """Return the log decay of A^power. Where A is 0 already, at the start of a packed sequence, it stays -inf."""
    return log_decay.clamp(max=STRONGEST_LOG_DECAY) if math.isinf(power) else log_decay * power


def raised_rate(rate: torch.Tensor, power: float) -> torch.Tensor:
    """Return what stands for `rate`, 0 or below, in log A = rate * step size, to get A^power."""
    return rate.clamp(max=-STRONGEST_RATE) if math.isinf(power) else rate * power


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


def raise_arguments(
    read: Callable[[Call], DecayInputs | None],
    decays: Mapping[str, Callable[[torch.Tensor, float], torch.Tensor]],
) -> Callable[[Call, float], Arguments | None]:
    """Build a `DecayHandle.raised` that changes each argument of an op by a function of it and the power.

    Arguments that are None, or that an op does not have, are left out.
    """

    def raised(call: Call, power: float) -> Arguments | None:
        if read(call) is None:
            return None
        given = {name: raise_ for name, raise_ in decays.items() if call.kwargs.get(name) is not None}
        changed = {name: raise_(call.kwargs[name], power) for name, raise_ in given.items()}
        return (call.args, {**call.kwargs, **changed}) if changed else None

    return raised


def least_used(written: torch.Tensor, read: torch.Tensor, share: float) -> torch.Tensor:
    """Return which state dimensions of each head are the least used, (heads | 1, state), true for `share` of them.

    Where the two have different numbers of heads, as with grouped queries, it is the same for all heads.

    Args:
        written: usage of each dimension by what writes to it, (heads | 1, state).
        read: usage by what reads it.
        share: rounded up to whole dimensions.

    Examples:
        >>> least_used(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[9.0, 1.0, 1.0, 0.1]]), 0.5)
        tensor([[False,  True, False,  True]])
    """
    if written.shape != read.shape:
        written, read = (usage.square().mean(0, keepdim=True).sqrt() for usage in (written, read))
    size = written.shape[1]
    order = (written * read).argsort(dim=-1, stable=True)[:, : math.ceil(share * size)]
    return torch.zeros_like(written, dtype=torch.bool).scatter(-1, order, True)


def reduce_arguments(
    is_meant: Callable[[Call], bool], written: Mapping[str, Axes], read: str, axes: Axes
) -> Callable[[Call, float], Arguments | None]:
    """Build a `StateHandle.reduced` of an op.

    Args:
        is_meant: whether an operator is read of a call.
        written: the arguments that write to the state. The first of them says how much each dimension is used.
        read: the argument that reads it.
        axes: of that argument.
    """

    def reduced(call: Call, share: float) -> Arguments | None:
        if not is_meant(call):
            return None
        first = next(iter(written))
        left_out = least_used(written[first].usage(call.kwargs[first]), axes.usage(call.kwargs[read]), share)
        changed: dict[str, Any] = {name: each.without(call.kwargs[name], left_out) for name, each in written.items()}
        return call.args, {**call.kwargs, **changed}

    return reduced
