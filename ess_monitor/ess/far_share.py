"""Measures how much of what a layer puts out comes from afar, without singular values and without forming T."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.ess.linalg import working_dtype
from ess_monitor.ess.operators.base import Operator, check_operator


class FarShare(NamedTuple):
    """Holds two squared norms of each operator, (batch, heads); float64, or float32 on devices that have no float64.

    The share of several operators together is the square root of sum(far_squared) / sum(total_squared).
    """

    far_squared: Tensor
    """||T[p+d:, :p]||_F^2: what comes from before position p."""
    total_squared: Tensor
    """||T[p+d:, :]||_F^2: all of it, the row's own token included."""


@torch.no_grad()
def far_share(operator: Operator, position: int, distance: int) -> FarShare:
    """Return how much of the outputs from position p + d on comes from the tokens before p, d tokens back and farther.

    A recurrence carries the n x n Gramian of its state at O(L n^2); attention, matrices and gated convolutions form
    their rows p + d, ..., L - 1, some at a time. On one CPU core a diagonal recurrence takes an eighth (512 tokens, n =
    64) to a fifth (4096 tokens, n = 16) of the time of `measure` at three positions, a delta rule a third to a half.

    Reads no value on the host. NaN or infinity in what these rows depend on gives NaN or infinity, in the same operator
    only.

    Args:
        operator: What to measure.
        position: p, in 1..length-1.
        distance: d, from 0 up, so that a row is left: p + d < length.

    Raises:
        OperatorError: `operator` is not an operator, `position` is out of range, or no row is left.

    Examples:
        >>> from ess_monitor.ess import DenseOperator
        >>> T = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [3.0, 0.0, 4.0]])
        >>> far, total = far_share(DenseOperator(T), 1, 1)  # the last row is 3, 0, 4; before position 1 is the 3
        >>> far, (far / total).sqrt()
        (tensor([[9.]], dtype=torch.float64), tensor([[0.6000]], dtype=torch.float64))
    """
    check_operator(operator)
    position, start = far_rows(operator, position, distance)
    squares = (
        operator._row_squares(position, start) if operator.segments is None else _squares(operator, position, start)
    )
    return far_and_total(operator, squares)


def far_rows(operator: Operator, position: int, distance: int) -> tuple[int, int]:
    """Return the position and the first row from afar; raise `OperatorError` unless `far_share` is defined there."""
    last = operator.length - 1
    position = validation.whole("position", position, 1, last, hint="see operator_positions()", error=OperatorError)
    hint = "a row must be left after position + distance"
    return position, position + validation.whole(
        "distance", distance, 0, last - position, hint=hint, error=OperatorError
    )


def far_and_total(operator: Operator, squares: tuple[Tensor, Tensor]) -> FarShare:
    """Return what `far_share` returns, from the `_row_squares` of an operator."""
    far, near = (each.expand(operator.batch, operator.heads) for each in squares)
    return FarShare(far, far + near)


def _squares(operator: Operator, position: int, start: int) -> tuple[Tensor, Tensor]:
    """Return the two squared norms of an operator with segments, from T itself."""
    d = operator.block_size
    rows = operator.materialize().to(working_dtype(operator.device))[..., d * start :, :].square()
    return rows[..., : d * position].sum((2, 3)), rows[..., d * position :].sum((2, 3))
