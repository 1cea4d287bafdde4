"""Where in the sequence H_i is measured."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Literal

from ess_monitor.errors import OperatorError


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
    if length < 1:
        raise OperatorError(f"length={length} must be at least 1; a sequence needs a token.")
    if positions == "midpoint":
        return (length // 2,) if length > 1 else ()
    if positions == "all":
        return tuple(range(1, length))
    if isinstance(positions, bool) or not isinstance(positions, int) or positions < 1:
        raise OperatorError(f"positions={positions!r} must be 'midpoint', 'all' or a number of positions from 1 up.")
    if positions >= length - 1:
        return tuple(range(1, length))
    parts = positions + 1
    return tuple((2 * k * length + parts) // (2 * parts) for k in range(1, parts))


def check_positions(positions: Sequence[int], length: int) -> tuple[int, ...]:
    """`positions` as integers, or `OperatorError` when one is outside 1..length-1."""
    checked = tuple(index(position) for position in positions)
    for position in checked:
        if not 1 <= position < length:
            raise OperatorError(
                f"position {position} must be in 1..{length - 1} for length {length}; use operator_positions()."
            )
    return checked
