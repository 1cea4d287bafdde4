"""y = T v for a diagonal linear recurrence: the checks, and which algorithm runs.

Shapes: B batch, H heads, L length, N state, V value dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.featurizers.chunked import chunked_scan, chunked_sum
from ess_monitor.featurizers.stepped import stepped_scan


def diagonal_scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    """y_i = sum_{j <= i} T_ij v_j with T_ij = sum_n q_i[n] exp(sum_{t=j+1..i} log_decay_t[n]) k_j[n].

    Exact and stable for every decay in 0..1: all exponents are sums of log-decays, so never positive, and nothing is
    divided by a cumulated decay. Parallel over the sequence, differentiable in all arguments. Computed in float32 at
    least, also under autocast: half precision rounds a decay of 0.999 to 1.

    Args:
        q, k: (B, H, L, N). The operator uses q as it is; scale it before.
        v: (B, H, L, V).
        log_decay: at most 0, -inf allowed; (B | 1, H | 1, L | 1, N | 1). Length 1 is a fixed decay, state 1 a scalar
            one. None: no decay (A = I), which takes a shorter way.

    Returns:
        (B, H, L, V) in the dtype of `v`.

    Raises:
        OperatorError: the shapes do not fit together, or something else than floating tensors of one device was given.

    Equals the recurrence S_t = diag(exp log_decay_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t.

    Example:
        >>> ones = torch.ones(1, 1, 3, 1)
        >>> diagonal_scan(ones, ones, ones, torch.tensor(0.5).log().expand(1, 1, 1, 1)).flatten()
        tensor([1.0000, 1.5000, 1.7500])
    """
    _check(q, k, v, log_decay)
    with torch.autocast(device_type=q.device.type, enabled=False):
        dtype = _precise(q, k, v, log_decay)
        q_BHLN, k_BHLN, v_BHLV = (x.to(dtype) for x in (q, k, v))
        if log_decay is None:
            y_BHLV = chunked_sum(q_BHLN, k_BHLN, v_BHLV)
        elif v.shape[-1] == 1:
            y_BHLV = stepped_scan(q_BHLN, k_BHLN, v_BHLV, log_decay.to(dtype))
        else:
            y_BHLV = chunked_scan(q_BHLN, k_BHLN, v_BHLV, log_decay.to(dtype))
        return y_BHLV.to(v.dtype)


def _precise(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v), ("log_decay", log_decay)):
        if tensor is None and name == "log_decay":
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise OperatorError(f"{name} is {validation.shown(tensor)}; pass a real floating tensor.")
        if tensor.device != q.device:
            raise OperatorError(f"{name} is on {tensor.device} and q on {q.device}; move them to one device.")
    if q.dim() != 4 or 0 in q.shape:
        raise OperatorError(
            f"q has shape {tuple(q.shape)}, expected (batch, heads, length, state), none of them empty."
        )
    if k.shape != q.shape:
        raise OperatorError(f"k has shape {tuple(k.shape)}, expected that of q, {tuple(q.shape)}; expand it before.")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3] or v.shape[3] == 0:
        expected = (*q.shape[:3], "values")
        raise OperatorError(f"v has shape {tuple(v.shape)}, expected {expected} to go with q {tuple(q.shape)}.")
    if log_decay is not None and (
        log_decay.dim() != 4 or any(size not in (1, full) for size, full in zip(log_decay.shape, q.shape, strict=True))
    ):
        raise OperatorError(
            f"log_decay has shape {tuple(log_decay.shape)}, expected one that broadcasts to q, {tuple(q.shape)}: "
            "size 1 or the full size in each dimension. Pass None for no decay."
        )
