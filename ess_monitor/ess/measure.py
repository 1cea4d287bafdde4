"""Measures all that the monitor reports of one operator, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ess_monitor import validation
from ess_monitor.ess.decay import decay_product_norm, mean_decay
from ess_monitor.ess.metrics import check_tolerance, entropy_ess, tolerance_ess
from ess_monitor.ess.operators.base import Operator, check_operator


@dataclass(frozen=True, eq=False)
class Measured:
    """Holds measurements of one operator, on its device. Entries of operators that are not finite are NaN."""

    singular_values: Tensor
    """(batch, heads, positions, rank), descending, zero-padded: the basis of the sizes below."""
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


@torch.no_grad()
def measure(
    operator: Operator, positions: Sequence[int], *, tolerance: float = 1e-3, retention: bool = True
) -> Measured:
    """Measure one operator. Reads no device value on the host, and raises nothing that depends on values.

    Args:
        operator: What to measure.
        positions: Positions in 1..length-1; empty for a sequence of one token, which gives empty sizes.
        tolerance: tau of the tolerance-ESS.
        retention: Also measure the operator with A := I; doubles the cost of a recurrence.

    Raises:
        OperatorError: `operator` is not an operator, or a position is out of range.
        ConfigError: `tolerance` is negative or not a number, or `retention` is not a flag.

    Example:
        >>> features = torch.eye(4).expand(1, 1, 4, 4)
        >>> from ess_monitor.ess import DiagonalRecurrence
        >>> measured = measure(DiagonalRecurrence(torch.zeros(1, 1, 1, 1), features, features.flip(2)), [2])
        >>> measured.tolerance_ess, measured.state_capacity
        (tensor([[[2.]]]), tensor([4.]))
    """
    check_operator(operator)
    tolerance = check_tolerance(tolerance, "tolerance")
    validation.flag("retention", retention)
    values = operator.singular_values(positions)
    undecayed = operator.without_decay() if retention else None
    return Measured(
        singular_values=values,
        tolerance_ess=tolerance_ess(values, tolerance),
        entropy_ess=entropy_ess(values),
        undecayed_ess=None if undecayed is None else tolerance_ess(undecayed.singular_values(positions), tolerance),
        mean_decay=mean_decay(operator),
        decay_product_norm=decay_product_norm(operator),
        finite=operator.finite() & values.isfinite().flatten(2).all(-1),
        state_capacity=operator.state_capacity(positions),
    )
