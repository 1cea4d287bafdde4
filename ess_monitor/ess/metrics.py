"""Computes effective state-size from singular values (equations 3 and 4 of arXiv 2504.19561), and aggregates it."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import ConfigError, OperatorError
from ess_monitor.ess.linalg import working_dtype

Aggregation = Literal["average", "total", "minimum"]
"""How samples and channels are combined."""

ToleranceScale = Literal["absolute", "output"]
"""Against what a tolerance is measured: against 1, or against what the layer puts out (`measure`)."""


@torch.no_grad()
def tolerance_ess(singular_values: Tensor, tau: float = 1e-3) -> Tensor:
    """Return the number of singular values above `tau`, an absolute tolerance (Eq. 3).

    It is the smallest state of a recurrence that reproduces H_i to within `tau` in spectral norm (Eckart-Young-Mirsky).

    Args:
        singular_values: (..., rank), zero-padded.
        tau: At least 0. Strictly larger values count, so a zero operator has size 0 at every tolerance.

    Returns:
        (...), floating. NaN where a singular value is NaN or infinite.

    Raises:
        ConfigError: `tau` is negative or not a number.
        OperatorError: `singular_values` is not a floating tensor of at least one dimension.

    Examples:
        >>> tolerance_ess(torch.tensor([[3.0, 0.5, 1e-3, 0.0]]))
        tensor([2.])
    """
    tau = check_tolerance(tau)
    _check_values(singular_values)
    count = (singular_values > tau).sum(-1).to(singular_values.dtype)
    return count.masked_fill_(~singular_values.isfinite().all(-1), torch.nan)


@torch.no_grad()
def entropy_ess(singular_values: Tensor) -> Tensor:
    """Return exp(-sum p log p) with p = sigma / sum sigma: an effective rank that needs no tolerance (Eq. 4).

    It ignores the scale of the operator: use `tolerance_ess` to judge collapse (appendix C.3).

    Args:
        singular_values: (..., rank), zero-padded.

    Returns:
        (...), from 1 to rank; 0 for a zero operator. NaN where a singular value is NaN or infinite.

    Raises:
        OperatorError: `singular_values` is not a floating tensor of at least one dimension.

    Examples:
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


@torch.no_grad()
def aggregate(
    ess: Tensor, over: Aggregation = "average", *, channels_per_head: int = 1, position: int | None = None
) -> Tensor:
    """Return one number for a layer from its ESS or TSS per sample, head and position.

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

    Examples:
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
            raise OperatorError("ess has no position to pick; pass position=None, or measure at one position at least.")
        hint = f"ess has {size} positions, and a negative index counts from the end"
        ess = ess[..., validation.whole("position", position, -size, size - 1, hint=hint, error=OperatorError), None]
    if over == "minimum":
        if 0 in ess.shape[:2]:
            raise OperatorError(f"ess has shape {tuple(ess.shape)}; the smallest of nothing is not defined.")
        return ess.amin((0, 1)).mean()
    if over == "total":
        return ess.sum(1).mean() * channels_per_head
    return ess.mean()


def check_tolerance(tau: float, name: str = "tau") -> float:
    """Return `tau`; raise `ConfigError` unless it is a finite number from 0 up."""
    return validation.real(name, tau, low=0, hint="the paper uses 1e-3")


def check_tolerance_scale(scale: str) -> None:
    """Raise `ConfigError` unless `scale` is a `ToleranceScale`."""
    if not isinstance(scale, str) or scale not in get_args(ToleranceScale):
        names = ", ".join(get_args(ToleranceScale))
        raise ConfigError(f"tolerance_scale={validation.shown(scale)} must be one of {names}.")


def _check_values(singular_values: Tensor) -> None:
    validation.tensor("singular_values", singular_values, "(..., rank)", range(1, 65), error=OperatorError)
