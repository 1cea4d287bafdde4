"""How much of the memory is lost to decay: the size of A, and the ESS that the same layer would have without it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.ess.delta_gramian import mean_diagonal, transition_product
from ess_monitor.ess.linalg import result_dtype, working_dtype
from ess_monitor.ess.metrics import tolerance_ess
from ess_monitor.ess.operators.base import Operator, check_operator
from ess_monitor.ess.operators.delta import DeltaRecurrence
from ess_monitor.ess.operators.fields import check_same_device
from ess_monitor.ess.operators.recurrence import DiagonalRecurrence


@torch.no_grad()
def decay_product_norm(operator: Operator) -> Tensor | None:
    """Frobenius norm of A_L ... A_1 over the whole sequence (section 4.2): sqrt(n) keeps everything, 0 forgets all.

    Returns:
        (batch, heads), NaN where the operator is not finite. None for an operator without transition matrices.

    Example:
        >>> ones = torch.ones(1, 1, 8, 4)
        >>> decay_product_norm(DiagonalRecurrence(torch.zeros(1, 1, 1, 1), ones, ones))
        tensor([[2.]])
    """
    check_operator(operator)
    if isinstance(operator, DeltaRecurrence):
        product = transition_product(operator.transitions, operator.batch, operator.heads)
        return _per_operator(operator, torch.linalg.matrix_norm(product))
    if not isinstance(operator, DiagonalRecurrence):
        return None
    log_decay = operator.log_decay
    total = log_decay.sum(2, dtype=working_dtype(log_decay.device))
    if log_decay.shape[2] == 1:
        total = total * operator.length
    repeated = operator.state_size // total.shape[-1]
    return _per_operator(operator, (repeated * (2 * total).exp().sum(-1)).sqrt())


@torch.no_grad()
def mean_decay(operator: Operator) -> Tensor | None:
    """Mean of A's diagonal over tokens and state dimensions, 0..1 where A is diagonal and stable.

    It is trace(A) / n, the mean eigenvalue, also where A is not diagonal: a delta rule with keys of norm 1 and no decay
    erases one direction a token and has 1 - mean(beta) / n.

    Returns:
        (batch, heads), NaN where the operator is not finite. None for an operator without transition matrices.

    Example:
        >>> ones = torch.ones(1, 1, 8, 4)
        >>> mean_decay(DiagonalRecurrence(torch.full((1, 1, 1, 1), 0.5).log(), ones, ones))
        tensor([[0.5000]])
    """
    check_operator(operator)
    if isinstance(operator, DeltaRecurrence):
        return _per_operator(operator, mean_diagonal(operator.transitions))
    if not isinstance(operator, DiagonalRecurrence):
        return None
    log_decay = operator.log_decay
    decay = log_decay.to(result_dtype(log_decay.dtype)).exp()
    return _per_operator(operator, decay.mean((2, 3), dtype=working_dtype(log_decay.device)))


@torch.no_grad()
def retention(operator: Operator, positions: Sequence[int], tau: float = 1e-3) -> Tensor:
    """Tolerance-ESS against that of the same operator with A := I (see `retention_ratio`).

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
    """ess / undecayed_ess, elementwise and always defined.

    Both 0 gives 1: there is nothing to remember, so the decay costs nothing. An operator that has memory only because
    of its decay counts against a memory of 1, which keeps the ratio finite and at least 1.

    Raises:
        OperatorError: the two are no floating tensors, or do not broadcast to one shape.

    Example:
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


def _per_operator(operator: Operator, values: Tensor) -> Tensor:
    dtype = result_dtype(*(tensor.dtype for tensor in operator.tensors))
    full = values.expand(operator.batch, operator.heads).to(dtype)
    return full.masked_fill(~operator.finite(), torch.nan)
