"""Where in the sequence H_i is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError

LONGEST = 2**31 - 1
"""Tokens of the longest sequence: what indices of 32 bits reach, which a kernel may use."""


def operator_positions(length: int, positions: Literal["midpoint", "all"] | int) -> tuple[int, ...]:
    """Positions i in 1..length-1 at which to measure H_i = T[i:, :i].

    Args:
        length: Tokens per sequence, at least 1.
        positions: "midpoint" for length // 2, where H_i is largest (appendix C.6); "all"; or a number P of evenly
            spaced positions, round(k * length / (P + 1)) for k = 1..P.

    Returns:
        Ascending, without repetition, at most length - 1 of them. Empty for length 1, which has no H_i.

    Raises:
        OperatorError: `length` or `positions` is out of range.

    Example:
        >>> operator_positions(128, "midpoint")
        (64,)
        >>> operator_positions(128, 3)
        (32, 64, 96)
    """
    length = validation.whole("length", length, 1, LONGEST, hint="a sequence needs a token", error=OperatorError)
    if positions == "midpoint":
        return (length // 2,) if length > 1 else ()
    if positions == "all":
        return tuple(range(1, length))
    number = validation.whole("positions", positions, 1, hint="or 'midpoint', or 'all'", error=OperatorError)
    if number >= length - 1:
        return tuple(range(1, length))
    parts = number + 1
    return tuple((2 * k * length + parts) // (2 * parts) for k in range(1, parts))


def check_positions(positions: Sequence[int], length: int) -> tuple[int, ...]:
    """`positions` as integers, or `OperatorError` when one is outside 1..length-1."""
    checked = validation.wholes("positions", positions, -validation.LARGEST, error=OperatorError)
    for position in checked:
        if not 1 <= position < length:
            raise OperatorError(
                f"positions: position {position} must be in 1..{length - 1} for length {length}; "
                "use operator_positions()."
            )
    return checked


Aggregation = Literal["average", "total", "minimum"]
"""How samples and channels are combined."""


@torch.no_grad()
def aggregate(
    ess: Tensor, over: Aggregation = "average", *, channels_per_head: int = 1, position: int | None = None
) -> Tensor:
    """One number for a layer from its ESS or TSS per sample, head and position.

    - "average": mean over samples and channels (C.1), for layers whose TSS is a design choice.
    - "total": sum over channels, then mean over samples (C.1): the paper's choice for softmax attention, whose TSS per
      channel does not depend on the layer's size.
    - "minimum": smallest over samples and channels (C.6, there at the midpoint).

    All three are then averaged over positions, unless `position` picks one.

    Args:
        ess: (batch, heads, positions).
        over: See above.
        channels_per_head: Value channels that share a head's operator, and with it its ESS; matters to "total" only.
        position: Index into the last dimension, for example `midpoint_index(...)`.

    Returns:
        A scalar tensor. NaN when an entry that it depends on is NaN.

    Raises:
        OperatorError: `ess` has another shape, or `over` is unknown.

    Example:
        >>> ess = torch.tensor([[[2.0, 4.0], [1.0, 1.0]]])  # one sample, two heads, two positions
        >>> aggregate(ess), aggregate(ess, "total", channels_per_head=8), aggregate(ess, "minimum", position=0)
        (tensor(2.), tensor(32.), tensor(1.))
    """
    validation.tensor("ess", ess, "(batch, heads, positions)", (3,), error=OperatorError)
    if not isinstance(over, str) or over not in get_args(Aggregation):
        raise OperatorError(f"over={validation.shown(over)} must be one of {', '.join(get_args(Aggregation))}.")
    validation.whole("channels_per_head", channels_per_head, 1, error=OperatorError)
    if position is not None:
        size = ess.shape[2]
        if not size:
            raise OperatorError("ess has no position to take; pass position=None, or measure at one position at least.")
        hint = f"ess has {size} positions, and a negative index counts from the end"
        ess = ess[..., validation.whole("position", position, -size, size - 1, hint=hint, error=OperatorError), None]
    if over == "minimum":
        if 0 in ess.shape[:2]:
            raise OperatorError(f"ess has shape {tuple(ess.shape)}; the smallest of nothing is not defined.")
        return ess.amin((0, 1)).mean()
    if over == "total":
        return ess.sum(1).mean() * channels_per_head
    return ess.mean()


def midpoint_index(positions: Sequence[int], length: int) -> int:
    """Index of the position nearest to length // 2, where H_i is largest.

    Raises:
        OperatorError: `positions` is empty or holds something else than whole numbers, or `length` is not one.

    Example:
        >>> midpoint_index([16, 32, 48], 64)
        1
    """
    validation.whole("length", length, 1, error=OperatorError)
    positions = validation.wholes("positions", positions, -validation.LARGEST, error=OperatorError)
    if not positions:
        raise OperatorError("positions is empty; a sequence needs at least two tokens to have a position.")
    return min(range(len(positions)), key=lambda p: abs(positions[p] - length // 2))
