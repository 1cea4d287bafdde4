"""The linear operators of the mixers, as modules without parameters.

A mixer calls its `core` with exactly the tensors that define y = T v. That call is the one place where the operator of
a forward pass can be observed (a forward hook) or changed (a forward pre-hook).
"""

from __future__ import annotations

import sys

import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.featurizers.scan import diagonal_scan


class DiagonalScan(nn.Module):
    """T_ij = sum_n q_i[n] exp(sum_{t=j+1..i} log_decay_t[n]) k_j[n]; see `diagonal_scan` for shapes and errors.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 2, 5, 4).unbind(0)
        >>> y = DiagonalScan()(q, k, v, None)  # linear attention
        >>> torch.allclose(y, (q @ k.mT).tril() @ v, atol=1e-6)
        True
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
        """y = T v, (batch, heads, length, values)."""
        return diagonal_scan(q, k, v, log_decay)


class CausalSoftmax(nn.Module):
    """T = softmax(scale q k^T) over the tokens up to each row's own.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 2, 5, 4).unbind(0)
        >>> torch.allclose(CausalSoftmax()(q, k, v, 0.5)[:, :, 0], v[:, :, 0])  # the first token sees itself alone
        True
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """y = T v, (batch, heads, length, values); q and k (batch, heads, length, state).

        Raises:
            OperatorError: the shapes do not fit together. Dtypes and devices are torch's to judge, as under autocast.
        """
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() != 4:
                raise OperatorError(
                    f"{name} is {validation.shown(tensor)}; "
                    "pass a floating tensor of shape (batch, heads, length, dim)."
                )
        if q.shape != k.shape or q.shape[:3] != v.shape[:3] or 0 in (*q.shape, *v.shape):
            raise OperatorError(
                f"q has shape {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}; q and k must be equal, and "
                "v but for its last dimension, with no empty one."
            )
        if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not abs(scale) <= sys.float_info.max:
            raise OperatorError(f"scale={validation.shown(scale)} must be a finite number, usually dim**-0.5.")
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
