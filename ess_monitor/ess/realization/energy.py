"""Measures what a smaller state costs: causal singular values, energy beyond a size, and errors of truncations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.ess.linalg import singular_values_, working_dtype
from ess_monitor.ess.operators.base import Operator, check_operator
from ess_monitor.ess.operators.jacobian import JacobianOperator
from ess_monitor.ess.positions import LONGEST, check_positions
from ess_monitor.ess.realization.balanced import control_factors
from ess_monitor.ess.realization.realize import Realization


@torch.no_grad()
def causal_singular_values(operator: Operator, positions: Sequence[int]) -> Tensor:
    """Return the singular values of the input-state projection C_i, H_i = O_i C_i (B.2.2 of the paper).

    C_i is what the inputs before position i have left in the state. Its rank is the causal ESS: the size that a state
    needs when it must not know what the later tokens will read, at least rank(H_i) and at most TSS. The scale is that
    of the layer's own state, so a tolerance of `tolerance_ess` means something else here.

    Where no recurrence is known (attention, matrices, Jacobians, filters longer than half of the sequence) the trivial
    realization stores inputs (B.2.3): as many ones as it stores.

    Args:
        operator: What to measure.
        positions: Positions i in 1..L-1, in any order.

    Returns:
        (batch, heads, positions, rank), descending and zero-padded. NaN for operators that are not finite.

    Raises:
        OperatorError: `operator` is not an operator, or a position is out of range.

    Examples:
        >>> from ess_monitor.ess import DiagonalRecurrence
        >>> unread = DiagonalRecurrence(torch.zeros(1, 1, 1, 1), torch.eye(3)[None, None], torch.zeros(1, 1, 3, 3))
        >>> unread.singular_values([2])  # nothing is read from the state
        tensor([[[[0.]]]])
        >>> causal_singular_values(unread, [2]).round(decimals=4)  # and two numbers are in it
        tensor([[[[1., 1., 0.]]]])
    """
    check_operator(operator)
    checked = check_positions(positions, operator.length)
    batch, heads = operator.batch, operator.heads
    if not checked:
        return torch.zeros((batch, heads, 0, 0), dtype=operator.result_dtype, device=operator.device)
    recurrence = operator._state_space()
    if recurrence is None:
        values = _stored_ones(operator, checked)
    else:
        if operator.segments is not None:
            operator._spans()
            recurrence = recurrence.in_segments(operator.segments)
        wanted = set(checked)
        factors = enumerate(control_factors(recurrence, batch, heads, max(checked)), start=1)
        found = {i: singular_values_(factor.clone()) for i, factor in factors if i in wanted}
        values = torch.stack([found[i] for i in checked], dim=2)
    return values.masked_fill(~operator.finite()[..., None, None], torch.nan).to(operator.result_dtype)


def _stored_ones(operator: Operator, positions: Sequence[int]) -> Tensor:
    """Return as many ones as the trivial realization stores inputs."""
    batch, heads = operator.batch, operator.heads
    if operator.segments is None:
        counts = operator._stored(positions).expand(batch, heads, -1)
    else:
        counts = torch.zeros((batch, heads, len(positions)), dtype=torch.long, device=operator.device)
        for rows, start, inside, part in operator._parts(positions):
            stored = part._stored([positions[p] - start for p in inside]).expand(part.batch, heads, -1)
            samples = rows if operator.segments.shape[0] > 1 else list(range(batch))
            for row, sample in enumerate(samples):
                counts[sample][:, inside] = stored[row if part.batch > 1 else 0]
    rank = int(counts.max())
    ones = torch.arange(rank, device=operator.device) < counts[..., None]
    return ones.to(working_dtype(operator.device))


@torch.no_grad()
def tail_energy(operator: Operator, sizes: Sequence[int], positions: Sequence[int] | None = None) -> Tensor:
    """Return what of H_i a state of r dimensions must miss: the sum of sigma_m^2 over m > r.

    It is a floor (Eckart-Young): for every operator T' of a recurrence with a state of r, ||T - T'||_F^2 is at least
    the largest of these over positions. `truncation_errors` has what a truncation reaches. For a Jacobian, whose
    singular values are found down to its tolerance only, the floor is lower and still one.

    Args:
        operator: What to measure.
        sizes: State sizes r, each from 0 up.
        positions: Positions i in 1..L-1; all of them by default.

    Returns:
        (batch, heads, positions, sizes).

    Raises:
        OperatorError: `operator` is not an operator, a size is negative, or a position is out of range.

    Examples:
        >>> from ess_monitor.ess import DenseOperator
        >>> T = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0] * 4, [2.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
        >>> tail_energy(DenseOperator(T), [0, 1, 2], [2]).round(decimals=4)
        tensor([[[[5., 1., 0.]]]])
    """
    check_operator(operator)
    checked = _checked_sizes(sizes)
    where = range(1, operator.length) if positions is None else positions
    values = operator.singular_values(where)
    # From the smallest up: small tails are not the difference of large sums.
    tails = values.to(working_dtype(operator.device)).square().flip(-1).cumsum(-1).flip(-1)
    tails = torch.nn.functional.pad(tails, (0, 1))
    index = torch.tensor([min(size, values.shape[-1]) for size in checked], device=operator.device, dtype=torch.long)
    return tails[..., index].to(operator.result_dtype)


@torch.no_grad()
def truncation_errors(realization: Realization, sizes: Sequence[int]) -> Tensor:
    """Return ||T - T_r||_F / ||T||_F for `realization.truncated(r)`: the relative error of outputs, for white inputs.

    Neither operator is formed: the covariance of both states is carried along the sequence, at O(L r^3) a size.

    Args:
        realization: What is truncated, as a rule `realize(operator)`.
        sizes: State sizes r, each from 0 up.

    Returns:
        (batch, heads, sizes); 0 for a zero operator.

    Raises:
        OperatorError: `realization` is not a `Realization`, or a size is negative.

    Examples:
        >>> from ess_monitor.ess import DenseOperator, realize
        >>> T = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0] * 4, [2.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
        >>> truncation_errors(realize(DenseOperator(T)), [1, 2]).square().round(decimals=4)  # 1 of 5
        tensor([[[0.2000, 0.0000]]])
    """
    hint = "realize(operator) gives one"
    validation.instance("realization", realization, Realization, hint=hint, error=OperatorError)
    lost, total = squared_truncation_errors(realization, _checked_sizes(sizes))
    ratio = lost / total.masked_fill(total == 0, 1.0)[..., None]
    return ratio.sqrt().to(realization.A.dtype)


@torch.no_grad()
def squared_truncation_errors(realization: Realization, checked: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return ||T - T_r||_F^2, (batch, heads, sizes), and ||T||_F^2, (batch, heads), in the working dtype."""
    A, B, C, D = (each.to(working_dtype(each.device)) for each in _matrices(realization))
    r = realization.size
    token = torch.arange(r, device=A.device)
    kept = torch.stack([token < size for size in checked]) if checked else token.new_zeros((0, r), dtype=torch.bool)
    inside = kept.to(A.dtype)[:, :, None]  # (sizes, r, 1)
    outside = 1 - inside
    state = A.new_zeros((*A.shape[:2], 1, r, r))  # covariance of s
    error = A.new_zeros((*A.shape[:2], len(checked), r, r))  # of e = s - s_r in the dimensions that are kept
    crossed = torch.zeros_like(error)  # of e and s
    lost, total = A.new_zeros((*A.shape[:2], len(checked))), D.square().sum((2, 3, 4))
    for i in range(realization.length):
        a, b, c = (each[:, :, i, None] for each in (A, B, C))
        total = total + _traces(c, state)[..., 0]
        # What the outputs miss is C (e + s outside), and e becomes A_kept (e + s outside) in the dimensions kept.
        missed = error + crossed * outside.mT + (crossed * outside.mT).mT + outside * state * outside.mT
        lost = lost + _traces(c, missed)
        both = crossed + outside * state
        kept_A = inside * a
        error, crossed = kept_A @ missed @ kept_A.mT, kept_A @ both @ a.mT
        state = a @ state @ a.mT + b @ b.mT
    return lost.clamp(min=0.0), total


@torch.no_grad()
def squared_norm(operator: Operator) -> Tensor:
    """Return ||T||_F^2, by the factors where the operator has them: (batch, heads), in the working dtype.

    Examples:
        >>> from ess_monitor.ess import DenseOperator
        >>> squared_norm(DenseOperator(torch.tensor([[3.0, 0.0], [0.0, 4.0]])))
        tensor([[25.]], dtype=torch.float64)
    """
    check_operator(operator)
    if operator.segments is not None or isinstance(operator, JacobianOperator):
        return operator.materialize().to(working_dtype(operator.device)).square().sum((2, 3))
    return operator._row_squares(0, 0)[1].expand(operator.batch, operator.heads)


def _matrices(realization: Realization) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return realization.A, realization.B, realization.C, realization.D


def _traces(c: Tensor, covariance: Tensor) -> Tensor:
    """Return trace(C P C^T): (batch, heads, sizes)."""
    return ((c @ covariance) * c).sum((-2, -1))


def _checked_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    return validation.wholes("sizes", sizes, 0, LONGEST, hint="state dimensions", error=OperatorError)
