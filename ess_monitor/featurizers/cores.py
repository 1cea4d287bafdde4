"""Applies the linear operators of the mixers, in modules without parameters.

A mixer calls its `core` with exactly the tensors that define y = T v. That call is the one place where the operator of
a forward pass can be observed (a forward hook) or changed (a forward pre-hook).

Shapes: B batch, H heads, L length, N state, V value dimensions.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.featurizers.chunked import chunked_scan, chunked_sum, stepped_scan


class DiagonalScan(nn.Module):
    """Applies T_ij = sum_n q_i[n] exp(sum_{t=j+1..i} log_decay_t[n]) k_j[n]; see `diagonal_scan` for shapes and errors.

    Examples:
        >>> q, k, v = torch.randn(3, 1, 2, 5, 4).unbind(0)
        >>> y = DiagonalScan()(q, k, v, None)  # linear attention
        >>> torch.allclose(y, (q @ k.mT).tril() @ v, atol=1e-6)
        True
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
        """Return y = T v, (batch, heads, length, values)."""
        return diagonal_scan(q, k, v, log_decay)


class CausalSoftmax(nn.Module):
    """Applies T = softmax(scale q k^T) over the tokens up to each row's own.

    Examples:
        >>> q, k, v = torch.randn(3, 1, 2, 5, 4).unbind(0)
        >>> torch.allclose(CausalSoftmax()(q, k, v, 0.5)[:, :, 0], v[:, :, 0])  # the first token sees itself alone
        True
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Return y = T v, (batch, heads, length, values); q and k are (batch, heads, length, state).

        Raises:
            OperatorError: The shapes do not fit together. Dtypes and devices are left to torch, as under autocast.
        """
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            validation.tensor(name, tensor, "(batch, heads, length, dim)", (4,), error=OperatorError)
        if q.shape != k.shape or q.shape[:3] != v.shape[:3] or 0 in (*q.shape, *v.shape):
            raise OperatorError(
                f"q has shape {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}; q and k must be equal, and "
                "v equal to them but for its last dimension; none may be empty."
            )
        # Written out: the compiler traces this for a scale that is not a constant, and not `math.isfinite`.
        if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not abs(scale) <= sys.float_info.max:
            raise OperatorError(f"scale={validation.shown(scale)} must be a finite number, usually dim**-0.5.")
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def diagonal_scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    """Return y_i = sum_{j <= i} T_ij v_j with T_ij = sum_n q_i[n] exp(sum_{t=j+1..i} log_decay_t[n]) k_j[n].

    Exact and stable for every decay in 0..1: all exponents are sums of log-decays, so never positive, and nothing is
    divided by a cumulative decay. Parallel over the sequence, differentiable in all arguments. Computed in float32 at
    least, also under autocast: half precision rounds a decay of 0.999 to 1.

    Args:
        q: (B, H, L, N). The operator uses q as it is; scale it before.
        k: as `q`.
        v: (B, H, L, V).
        log_decay: at most 0, -inf allowed; (B | 1, H | 1, L | 1, N | 1). Length 1 is a fixed decay, state 1 a scalar
            one. None: no decay (A = I), which is computed faster.

    Returns:
        (B, H, L, V) in the dtype of `v`.

    Raises:
        OperatorError: The shapes do not fit together, or an argument is not a floating tensor on the device of q.

    Equals the recurrence S_t = diag(exp log_decay_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t.

    Examples:
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
    for name, tensor in (("q", q), ("k", k), ("v", v), ("log_decay", q if log_decay is None else log_decay)):
        validation.tensor(name, tensor, "(batch, heads, length, ...)", range(65), error=OperatorError)
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
