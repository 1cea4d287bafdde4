"""Chooses and checks the positions in the sequence at which H_i is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ess_monitor import validation
from ess_monitor.errors import OperatorError

LONGEST = 2**31 - 1
"""Tokens of the longest sequence: kernels may use indices of 32 bits."""


def operator_positions(length: int, positions: Literal["midpoint", "all"] | int) -> tuple[int, ...]:
    """Return positions i in 1..length-1 at which to measure H_i = T[i:, :i].

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


def midpoint_index(positions: Sequence[int], length: int) -> int:
    """Return the index of the position nearest to length // 2, where H_i is largest.

    Raises:
        OperatorError: `positions` is empty, or it or `length` is not of whole numbers.

    Example:
        >>> midpoint_index([16, 32, 48], 64)
        1
    """
    validation.whole("length", length, 1, error=OperatorError)
    positions = validation.wholes("positions", positions, -validation.LARGEST, error=OperatorError)
    if not positions:
        raise OperatorError("positions is empty; a sequence needs at least two tokens to have a position.")
    return min(range(len(positions)), key=lambda p: abs(positions[p] - length // 2))


def check_positions(positions: Sequence[int], length: int) -> tuple[int, ...]:
    """Return `positions` as integers; raise `OperatorError` when one is outside 1..length-1."""
    checked = validation.wholes("positions", positions, -validation.LARGEST, error=OperatorError)
    for position in checked:
        if not 1 <= position < length:
            raise OperatorError(
                f"positions: position {position} must be in 1..{length - 1} for length {length}; "
                "use operator_positions()."
            )
    return checked
