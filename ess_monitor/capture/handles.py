"""What an intervention may act on: found by the capture room, used by the interventions.

A handle says where in a layer something is, never what to do with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class DecayHandle:
    """The place where a layer's log-decay, with everything that determines it behind it, enters the recurrence."""

    parameters: tuple[str, ...]
    """What determines the decay, for `describe`: names below the layer."""
    point: str
    """Sub-module whose call takes the log-decay as an argument."""
    read: Callable[[tuple[Any, ...], dict[str, Any]], torch.Tensor]
    """`(args, kwargs) -> log_decay` of a call of that sub-module."""
    write: Callable[[tuple[Any, ...], dict[str, Any], torch.Tensor], Arguments]
    """`(args, kwargs, log_decay) -> (args, kwargs)` with another log-decay in its place."""


@dataclass(frozen=True)
class AlphaHandle:
    """A parameter or buffer that scales the whole log-decay: log A = -exp(sign * t) * (what the input decides)."""

    tensor: str
    """Its name below the layer."""
    sign: float
    """+1: raising the tensor by ln f multiplies the decay rate by f (A_log). -1: divides it (log alpha)."""

    def of(self, layer: nn.Module) -> torch.Tensor:
        """The tensor itself."""
        owner, _, name = self.tensor.rpartition(".")
        found: torch.Tensor = getattr(layer.get_submodule(owner), name)
        return found


def positional(index: int, point: str, parameters: tuple[str, ...]) -> DecayHandle:
    """A decay that is the positional argument `index` of the call of `point`."""

    def write(args: tuple[Any, ...], kwargs: dict[str, Any], log_decay: torch.Tensor) -> Arguments:
        return (*args[:index], log_decay, *args[index + 1 :]), kwargs

    return DecayHandle(parameters, point, lambda args, kwargs: args[index], write)
