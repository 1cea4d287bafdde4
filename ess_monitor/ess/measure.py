"""Measures one operator: its effective sizes, its decay, and the memory that the decay costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.ess.far_share import FarShare, far_and_total, far_rows, far_share
from ess_monitor.ess.metrics import (
    ToleranceScale,
    check_tolerance,
    check_tolerance_scale,
    entropy_ess,
    tolerance_ess,
)
from ess_monitor.ess.operators.base import Operator, check_operator
from ess_monitor.ess.operators.fields import check_same_device


@dataclass(frozen=True, eq=False)
class Measured:
    """Holds measurements of one operator, on its device. Entries of operators that are not finite are NaN."""

    singular_values: Tensor
    """(batch, heads, positions, rank), descending, zero-padded: the basis of the sizes below. Of H_i, or of H_i from T
    with unit rows where `tolerance_scale` is "output". On a CPU one that is a share x of the largest is right to 1e-3
    or 4e-15 / x^2 of itself, and what is below single precision's share may be 0; the sizes are right to 1e-5 all the
    same, and the counts at a hundredth to a hundred times the tolerance are those of the exact values.
    `Operator.singular_values` has them exactly."""
    tolerance_ess: Tensor
    """(batch, heads, positions): singular values above the tolerance."""
    entropy_ess: Tensor
    """(batch, heads, positions): exp of the entropy of the normalized singular values."""
    undecayed_ess: Tensor | None
    """(batch, heads, positions): tolerance-ESS with A := I. None when not asked for, or where there is no A."""
    mean_decay: Tensor | None
    """(batch, heads): mean of A's diagonal. None where there is no A."""
    decay_product_norm: Tensor | None
    """(batch, heads): Frobenius norm of the product of A over the sequence. None where there is no A."""
    finite: Tensor
    """(batch, heads) bool: False where an input is NaN or infinite, or where no factorization converges."""
    state_capacity: Tensor
    """(positions,): TSS per channel."""
    far_share: FarShare | None = None
    """What `far_share` returns where `far_share_at` says. None when not asked for."""


@torch.no_grad()
def measure(
    operator: Operator,
    positions: Sequence[int],
    *,
    tolerance: float = 1e-3,
    tolerance_scale: ToleranceScale = "absolute",
    retention: bool = True,
    far_share_at: tuple[int, int] | None = None,
) -> Measured:
    """Measure one operator. Reads no device value on the host, and raises nothing that depends on values.

    Args:
        operator: What to measure.
        positions: Positions in 1..length-1; empty for a sequence of one token, which gives empty sizes.
        tolerance: tau of the tolerance-ESS.
        tolerance_scale: "absolute" counts singular values of H_i above tau (Eq. 3). "output" counts those of H_i with
            rows divided by their norms in T (`Operator.with_unit_rows`): tau is a share of what the layer puts out at
            each token, and neither the size of B and C nor a norm behind the layer matters. All singular values and
            sizes are then those of this matrix, also with A := I.
        retention: Also measure the operator with A := I; a tenth to a quarter of the time of a recurrence.
        far_share_at: Position and distance at which `far_share` is measured, too. Attention then forms its rows once.

    Raises:
        OperatorError: `operator` is not an operator, or a position or distance is out of range.
        ConfigError: `tolerance` is negative or not a number, `tolerance_scale` is unknown, or `retention` is not a
            flag.

    Examples:
        >>> features = torch.eye(4).expand(1, 1, 4, 4)
        >>> from ess_monitor.ess import DiagonalRecurrence
        >>> measured = measure(DiagonalRecurrence(torch.zeros(1, 1, 1, 1), features, features.flip(2)), [2])
        >>> measured.tolerance_ess, measured.state_capacity
        (tensor([[[2.]]]), tensor([4.]))
    """
    check_operator(operator)
    tolerance = check_tolerance(tolerance, "tolerance")
    validation.flag("retention", retention)
    check_tolerance_scale(tolerance_scale)
    finite = operator.finite()
    values, far = _values(operator, positions, finite, tolerance, tolerance_scale, far_share_at)
    undecayed, undecayed_ess = operator.without_decay() if retention else None, None
    if undecayed is not None:
        undecayed_ess = _scaled(undecayed, tolerance_scale)._tolerance_ess(positions, finite, tolerance)
        undecayed_ess = undecayed_ess.to(operator.result_dtype)
    return Measured(
        singular_values=values,
        tolerance_ess=tolerance_ess(values, tolerance),
        entropy_ess=entropy_ess(values),
        undecayed_ess=undecayed_ess,
        mean_decay=_mean_decay(operator, finite),
        decay_product_norm=_decay_product_norm(operator, finite),
        finite=finite & values.isfinite().flatten(2).all(-1),
        state_capacity=operator.state_capacity(positions),
        far_share=far,
    )


def _values(
    operator: Operator,
    positions: Sequence[int],
    finite: Tensor,
    tolerance: float,
    scale: ToleranceScale,
    far_share_at: tuple[int, int] | None,
) -> tuple[Tensor, FarShare | None]:
    place = None if far_share_at is None else _checked_place(far_share_at)
    if place is None or scale != "absolute" or operator.segments is not None:
        values = _scaled(operator, scale)._singular_values(positions, finite, tolerance).to(operator.result_dtype)
        return values, None if place is None else far_share(operator, *place)
    values, squares = operator._values_and_squares(positions, finite, tolerance, *far_rows(operator, *place))
    return values, far_and_total(operator, squares)


def _checked_place(given: tuple[int, int]) -> tuple[int, int]:
    numbers = validation.wholes("far_share_at", given, -validation.LARGEST, error=OperatorError)
    if len(numbers) != 2:
        raise OperatorError(f"far_share_at={validation.shown(given)} must be a position and a distance, or None.")
    return numbers[0], numbers[1]


@torch.no_grad()
def decay_product_norm(operator: Operator) -> Tensor | None:
    """Return the Frobenius norm of A_L ... A_1 over the sequence (section 4.2): sqrt(n) keeps all, 0 forgets all.

    Returns:
        (batch, heads), NaN where the operator is not finite. None for an operator without transition matrices.

    Examples:
        >>> from ess_monitor.ess import DiagonalRecurrence
        >>> ones = torch.ones(1, 1, 8, 4)
        >>> decay_product_norm(DiagonalRecurrence(torch.zeros(1, 1, 1, 1), ones, ones))
        tensor([[2.]])
    """
    check_operator(operator)
    return _decay_product_norm(operator, operator.finite())


@torch.no_grad()
def mean_decay(operator: Operator) -> Tensor | None:
    """Return the mean of A's diagonal over tokens and state dimensions, 0..1 where A is diagonal and stable.

    It is trace(A) / n, the mean eigenvalue, also where A is not diagonal: a delta rule with keys of norm 1 and no decay
    erases one direction a token and has 1 - mean(beta) / n.

    Returns:
        (batch, heads), NaN where the operator is not finite. None for an operator without transition matrices.

    Examples:
        >>> from ess_monitor.ess import DiagonalRecurrence
        >>> ones = torch.ones(1, 1, 8, 4)
        >>> mean_decay(DiagonalRecurrence(torch.full((1, 1, 1, 1), 0.5).log(), ones, ones))
        tensor([[0.5000]])
    """
    check_operator(operator)
    return _mean_decay(operator, operator.finite())


@torch.no_grad()
def retention(operator: Operator, positions: Sequence[int], tau: float = 1e-3) -> Tensor:
    """Return tolerance-ESS divided by that of the same operator with A := I (see `retention_ratio`).

    Below 1 the decay costs memory; near 1 it does not, and what limits the ESS are the features or the data.

    Returns:
        (batch, heads, positions); 1 for an operator without transition matrices.

    Raises:
        OperatorError: A position is out of range.
        ConfigError: `tau` is negative or not a number.
    """
    check_operator(operator)
    ess = tolerance_ess(operator.singular_values(positions), tau)
    undecayed = operator.without_decay()
    if undecayed is None:
        return torch.where(ess.isnan(), ess, 1.0)
    return retention_ratio(ess, tolerance_ess(undecayed.singular_values(positions), tau))


@torch.no_grad()
def retention_ratio(ess: Tensor, undecayed_ess: Tensor) -> Tensor:
    """Return ess / undecayed_ess, elementwise and always defined.

    Both 0 gives 1: there is nothing to remember, so the decay costs nothing. An operator that has memory only because
    of its decay counts against a memory of 1, which keeps the ratio finite and at least 1.

    Raises:
        OperatorError: An argument is not a floating tensor, or the two do not broadcast to one shape.

    Examples:
        >>> retention_ratio(torch.tensor([3.0, 0.0, 2.0]), torch.tensor([4.0, 0.0, 0.0]))
        tensor([0.7500, 1.0000, 2.0000])
    """
    for name, tensor in (("ess", ess), ("undecayed_ess", undecayed_ess)):
        validation.tensor(name, tensor, "(...)", range(65), error=OperatorError)
    check_same_device(ess=ess, undecayed_ess=undecayed_ess)
    try:
        torch.broadcast_tensors(ess, undecayed_ess)  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise OperatorError(
            f"ess has shape {tuple(ess.shape)} and undecayed_ess {tuple(undecayed_ess.shape)}; they must broadcast."
        ) from None
    nothing = (ess == 0) & (undecayed_ess == 0)
    return (ess / undecayed_ess.clamp(min=1.0)).masked_fill(nothing, 1.0)


def _scaled(operator: Operator, scale: ToleranceScale) -> Operator:
    return operator.with_unit_rows() if scale == "output" else operator


def _decay_product_norm(operator: Operator, finite: Tensor) -> Tensor | None:
    return _where(finite, operator._product_norm(), operator)


def _mean_decay(operator: Operator, finite: Tensor) -> Tensor | None:
    return _where(finite, operator._mean_diagonal(), operator)


def _where(finite: Tensor, values: Tensor | None, operator: Operator) -> Tensor | None:
    if values is None:
        return None
    full = values.expand(operator.batch, operator.heads).to(operator.result_dtype)
    return full.masked_fill(~finite, torch.nan)
