"""Effective state-size from singular values (equations 3 and 4 of arXiv 2504.19561)."""

from __future__ import annotations

import torch
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.ess.linalg import working_dtype


@torch.no_grad()
def tolerance_ess(singular_values: Tensor, tau: float = 1e-3) -> Tensor:
    """Number of singular values above `tau`, an absolute tolerance (Eq. 3).

    The smallest state with which a recurrence reproduces H_i to within `tau` in spectral norm (Eckart-Young-Mirsky).

    Args:
        singular_values: (..., rank), zero-padded.
        tau: At least 0. Strictly larger values count, so a zero operator has size 0 at every tolerance.

    Returns:
        (...), floating. NaN where a singular value is NaN or infinite.

    Raises:
        ConfigError: `tau` is negative or not a number.
        OperatorError: `singular_values` is no floating tensor of one dimension at least.

    Example:
        >>> tolerance_ess(torch.tensor([[3.0, 0.5, 1e-3, 0.0]]))
        tensor([2.])
    """
    tau = check_tolerance(tau)
    _check_values(singular_values)
    count = (singular_values > tau).sum(-1).to(singular_values.dtype)
    return count.masked_fill_(~singular_values.isfinite().all(-1), torch.nan)


@torch.no_grad()
def entropy_ess(singular_values: Tensor) -> Tensor:
    """exp(-sum p log p) with p = sigma / sum sigma: an effective rank that needs no tolerance (Eq. 4).

    Blind to the size of the operator: use `tolerance_ess` to judge collapse (appendix C.3).

    Args:
        singular_values: (..., rank), zero-padded.

    Returns:
        (...), from 1 to rank; 0 for a zero operator. NaN where a singular value is NaN or infinite.

    Raises:
        OperatorError: `singular_values` is no floating tensor of one dimension at least.

    Example:
        >>> entropy_ess(torch.tensor([[2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]))
        tensor([2., 0.])
    """
    _check_values(singular_values)
    if singular_values.shape[-1] == 0:
        return singular_values.new_zeros(singular_values.shape[:-1])
    values = singular_values.to(working_dtype(singular_values.device))
    largest = values.amax(-1, keepdim=True)
    zero = largest == 0
    values = values / largest.masked_fill(zero, 1.0)  # first by the largest: a sum of huge values overflows
    share = values / values.sum(-1, keepdim=True).masked_fill(zero, 1.0)
    size = (-torch.xlogy(share, share).sum(-1)).exp()
    return size.masked_fill_(zero.squeeze(-1), 0.0).to(singular_values.dtype)


def check_tolerance(tau: float, name: str = "tau") -> float:
    """`tau`, or `ConfigError` where it is no finite number from 0 up."""
    return validation.real(name, tau, low=0, hint="the paper uses 1e-3")


def _check_values(singular_values: Tensor) -> None:
    validation.tensor("singular_values", singular_values, "(..., rank)", range(1, 65), error=OperatorError)
