"""Chooses the positions at which H_i is measured, and bounds tolerance-ESS at those in between.

Also finds how far from a position the tokens matter at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.ess.linalg import index_tensor

NEGLIGIBLE = 1e-17
"""Share of the norm of a factor that may be left out of it."""

MOST_POSITIONS = 64
"""At more of them it takes too long to look at each."""

Positions = Literal["midpoint", "all"] | int
"""How positions are placed in a sequence, as in `operator_positions`."""

LONGEST = 2**31 - 1
"""Tokens of the longest sequence: kernels may use indices of 32 bits."""


def operator_positions(length: int, positions: Positions) -> tuple[int, ...]:
    """Return positions i in 1..length-1 at which to measure H_i = T[i:, :i].

    Args:
        length: Tokens per sequence, at least 1.
        positions: "midpoint" for length // 2, where H_i is largest (appendix C.6); "all"; or a number P of evenly
            spaced positions, round(k * length / (P + 1)) for k = 1..P.

    Returns:
        Ascending, without repetition, at most length - 1 of them. Empty for length 1, which has no H_i.

    Raises:
        OperatorError: `length` or `positions` is out of range.

    Examples:
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

    Examples:
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


def tokens_in_reach(
    log_norm: Tensor, written: Tensor, read: Tensor, first_read: Tensor, positions: Sequence[int], state: int
) -> Tensor:
    """Return how many tokens on either side of every position make H_i, to rounding: N, N/2 or N/4; 0 stands for all.

    What is left out of C_i and O_i is below `NEGLIGIBLE` of their norms; a factorization rounds by more. Looked for on
    a CPU and at few positions.

    Args:
        log_norm: (B|1, H|1, L), log of a bound of the spectral norm of A_t.
        written: (B|1, H|1, L), norms of the inputs of the state.
        read: (B|1, H|1, L), norms of what reads it.
        first_read: (B|1, H|1, P), norms of c_i A_i at the positions.

    Returns:
        (B|1, H|1)
    """
    length, reach = log_norm.shape[2], torch.zeros((1, 1), dtype=torch.long, device=log_norm.device)
    if log_norm.device.type != "cpu" or len(positions) > MOST_POSITIONS:
        return reach
    log_norm = log_norm.double()
    all_written, all_read = (torch.linalg.vector_norm(each, dim=-1, dtype=torch.float64) for each in (written, read))
    for size in (state, state // 2, state // 4):
        enough = (log_norm <= 0.0).all(-1)
        for p, i in enumerate(positions):
            older = log_norm[:, :, max(0, i - size) : i].sum(-1).exp() * all_written
            newer = log_norm[:, :, i : i + size].sum(-1).exp() * all_read
            enough = enough & ((older < NEGLIGIBLE * written[:, :, i - 1]) | (i <= size))
            enough = enough & ((newer < NEGLIGIBLE * first_read[:, :, p]) | (length - i <= size))
        reach = torch.where(enough, size, reach)
    return reach


@dataclass(frozen=True, eq=False)
class Bounds:
    """Holds certified bounds of tolerance-ESS, inclusive."""

    lower: Tensor
    """(..., length - 1): at positions 1..length-1."""
    upper: Tensor
    """(..., length - 1): at positions 1..length-1."""
    mean_lower: Tensor
    """(...): of the mean over all positions. NaN for length 1, which has no position."""
    mean_upper: Tensor
    """(...): of the mean over all positions."""


@torch.no_grad()
def ess_bounds(
    positions: Sequence[int],
    ess: Tensor,
    length: int,
    *,
    capacity: float | Tensor | None = None,
    block_size: int = 1,
) -> Bounds:
    """Return bounds of tolerance-ESS at every position, from its values at some positions.

    Going from H_i to H_{i+1} removes d rows and adds d columns (d is the block size). By the interlacing of singular
    values the first lowers the count by at most d and the second raises it by at most d, so tolerance-ESS changes by at
    most d from a position to the next, and positions s apart fix it to within d s / 2 in between. It also lies in
    0..d min(i, length - i), and below the state capacity. Entropy-ESS has no such bound.

    Args:
        positions: Distinct positions in 1..length-1, ascending; may be empty.
        ess: (..., positions), tolerance-ESS at `positions`, or any average of it over samples and heads.
        length: Tokens per sequence.
        capacity: TSS: one number, or one per position 1..length-1.
        block_size: Rows of T per token, d.

    Raises:
        OperatorError: `positions` are out of order or out of range, `ess` has another number of positions, or
            `capacity` is neither one number nor one per position.

    Examples:
        >>> bounds = ess_bounds([4, 8], torch.tensor([4.0, 2.0]), 12, capacity=4)
        >>> bounds.lower
        tensor([1., 2., 3., 4., 3., 2., 1., 2., 1., 0., 0.])
        >>> bounds.upper
        tensor([1., 2., 3., 4., 4., 4., 3., 2., 3., 2., 1.])
    """
    length = validation.whole("length", length, 1, LONGEST, error=OperatorError)
    block_size = validation.whole("block_size", block_size, 1, LONGEST, error=OperatorError)
    checked = check_positions(positions, length)
    validation.tensor("ess", ess, "(..., positions)", range(1, 65), error=OperatorError)
    if any(later <= earlier for earlier, later in pairwise(checked)):
        raise OperatorError(f"positions={list(positions)} must be ascending, without repetition; sort them with `ess`.")
    if ess.shape[-1:] != (len(checked),):
        raise OperatorError(
            f"ess has shape {tuple(ess.shape)}, expected (..., {len(checked)}): one entry for each of positions."
        )
    device = ess.device
    place = torch.arange(1, length, device=device)
    limit = (block_size * torch.minimum(place, length - place)).to(ess.dtype)
    if capacity is not None:
        limit = torch.minimum(limit, _capacity(capacity, length, ess))
    # ESS is 0 before the first position and after the last: sentinels there give the geometric bound.
    known = torch.nn.functional.pad(ess, (1, 1))
    anchors = (0, *checked, length)
    anchor = index_tensor(anchors, device)
    right = torch.searchsorted(anchor, place)
    left = torch.searchsorted(anchor, place, right=True) - 1
    upper, lower = limit.expand(*ess.shape[:-1], -1), torch.zeros_like(limit)
    # The nearest anchor on each side suffices: a farther one is itself within the reach of the nearer.
    for index in (left, right):
        reach = (block_size * (anchor[index] - place).abs()).to(ess.dtype)
        upper = torch.minimum(upper, known[..., index] + reach)
        lower = torch.maximum(lower, known[..., index] - reach)
    return Bounds(lower, upper, lower.mean(-1), upper.mean(-1))


def _capacity(capacity: float | Tensor, length: int, ess: Tensor) -> Tensor:
    if not isinstance(capacity, Tensor):
        return ess.new_full((), validation.real("capacity", capacity, low=0, error=OperatorError))
    if capacity.is_complex() or tuple(capacity.shape) not in ((), (1,), (length - 1,)):
        raise OperatorError(
            f"capacity is {validation.shown(capacity)}; pass one number, or a real tensor of shape ({length - 1},): "
            "one per position 1..length-1."
        )
    if capacity.is_meta != ess.is_meta:
        raise OperatorError(f"capacity is on {capacity.device} and ess on {ess.device}; move them to one device.")
    return capacity.to(ess)
