"""Computes what `ess_monitor.ess` must agree with: T entry by entry in float64, and the SVD of every H_i.

Shares no code with the package. Inputs of any dtype are first converted to float64, which is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ess_monitor.ess import Operator, entropy_ess, tolerance_ess

ERROR = {torch.float32: 2e-6, torch.float64: 1e-12}
"""Allowed error of a singular value, as a share of the largest, by dtype of the result."""


def recurrence(log_decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    log_decay, b, c = torch.broadcast_tensors(log_decay.double(), b.double(), c.double())
    samples, heads, length, _ = b.shape
    T = torch.zeros(samples, heads, length, length, dtype=torch.float64)
    for i in range(length):
        for j in range(i + 1):
            decay = log_decay[:, :, j + 1 : i + 1].sum(2).exp()
            T[:, :, i, j] = (c[:, :, i] * decay * b[:, :, j]).sum(-1)
    return T


def delta_rule(log_decay: Tensor, beta: Tensor, k: Tensor) -> Tensor:
    """Every transition of the gated delta rule as a matrix: (samples, heads, length, n, n)."""
    k, beta = k.double(), beta.double()[..., None, None]
    erase = torch.eye(k.shape[-1], dtype=torch.float64) - beta * k[..., :, None] * k[..., None, :]
    return erase @ torch.diag_embed(log_decay.double().exp().expand(*log_decay.shape[:3], k.shape[-1]))


def diagonal_plus_rank_one(log_decay: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The same for diag(exp(log_decay)) + left right^T."""
    diagonal = torch.diag_embed(log_decay.double().exp().expand(*log_decay.shape[:3], left.shape[-1]))
    return diagonal + left.double()[..., :, None] * right.double()[..., None, :]


def matrix_recurrence(A: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """T of s_t = A_t s_{t-1} + b_t u_t, y_t = c_t . s_t."""
    length = b.shape[2]
    samples, heads = torch.broadcast_shapes(A.shape[:2], b.shape[:2], c.shape[:2])
    A, b, c = (tensor.double().expand(samples, heads, length, *tensor.shape[3:]) for tensor in (A, b, c))
    T = torch.zeros(samples, heads, length, length, dtype=torch.float64)
    state = torch.zeros(samples, heads, b.shape[-1], length, dtype=torch.float64)
    for i in range(length):
        state = A[:, :, i] @ state
        state[..., i] = b[:, :, i]
        T[:, :, i] = (c[:, :, i, None] @ state).squeeze(2)
    return T


def attention(q: Tensor, k: Tensor, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    samples, heads, length, dim = q.shape
    samples = max(samples, k.shape[0])
    group = heads // k.shape[1]
    q, k = q.double().expand(samples, -1, -1, -1), k.double().expand(samples, -1, -1, -1)
    if mask is not None:
        mask = mask.expand(samples, heads, length, length)
    T = torch.zeros(samples, heads, length, length, dtype=torch.float64)
    for s in range(samples):
        for h in range(heads):
            for i in range(length):
                weights = torch.zeros(i + 1, dtype=torch.float64)
                logits = (k[s, h // group, : i + 1] @ q[s, h, i]) * (dim**-0.5 if scale is None else scale)
                keep = torch.ones(i + 1, dtype=torch.bool)
                if mask is not None and mask.dtype == torch.bool:
                    keep = mask[s, h, i, : i + 1]
                elif mask is not None:
                    keep = mask[s, h, i, : i + 1] > torch.finfo(mask.dtype).min
                    logits = logits + mask[s, h, i, : i + 1]
                if keep.any():
                    weights[keep] = torch.softmax(logits[keep], 0)
                T[s, h, i, : i + 1] = weights
    return T


def convolution(kernel: Tensor, length: int, b: Tensor | None = None, c: Tensor | None = None) -> Tensor:
    ones = torch.ones(1, 1, length, dtype=torch.float64)
    b, c = (ones if gate is None else gate.double() for gate in (b, c))
    samples, heads = (max(sizes) for sizes in zip(kernel.shape[:2], b.shape[:2], c.shape[:2], strict=True))
    kernel = kernel.double().expand(samples, heads, -1)
    b, c = b.expand(samples, heads, -1), c.expand(samples, heads, -1)
    T = torch.zeros(samples, heads, length, length, dtype=torch.float64)
    for i in range(length):
        for j in range(max(0, i - kernel.shape[-1] + 1), i + 1):
            T[:, :, i, j] = c[:, :, i] * kernel[:, :, i - j] * b[:, :, j]
    return T


def singular_values(T: Tensor, i: int, block_size: int = 1) -> Tensor:
    return torch.linalg.svdvals(T[..., block_size * i :, : block_size * i])


def entropy_size(values: Tensor) -> float:
    total = math.fsum(values.tolist())
    shares = [value / total for value in values.tolist() if value > 0] if total > 0 else []
    return math.exp(-math.fsum(share * math.log(share) for share in shares)) if shares else 0.0


def assert_agrees(
    operator: Operator,
    T: Tensor,
    *,
    positions: Sequence[int] | None = None,
    tau: float = 1e-3,
    error: float | None = None,
    magnitudes: Tensor | None = None,
) -> None:
    """The operator's singular values and both sizes at `positions` (all of them by default) are those of `T`.

    `magnitudes` has the sums of absolute terms of which the entries of T are sums: where these cancel, rounding is a
    share of the terms, and the entropy of what is left says nothing.
    """
    d = operator.block_size
    length = T.shape[-1] // d
    positions = range(1, length) if positions is None else positions
    assert (operator.batch, operator.heads, operator.length) == (*T.shape[:2], length)
    values = operator.singular_values(positions)
    assert values.shape[:3] == (*T.shape[:2], len(positions))
    assert (values.diff(dim=-1) <= 0).all(), "descending"
    counts, entropies = tolerance_ess(values, tau), entropy_ess(values)
    allowed = ERROR[values.dtype] if error is None else error
    tiny = torch.finfo(values.dtype).tiny  # below it the result's dtype itself has no digits left
    for p, i in enumerate(positions):
        expected = singular_values(T, i, d)
        padded = torch.zeros_like(values[:, :, p], dtype=torch.float64)
        kept = min(expected.shape[-1], padded.shape[-1])
        padded[..., :kept] = expected[..., :kept]
        largest = (expected if magnitudes is None else singular_values(magnitudes, i, d))[..., :1]
        assert (expected[..., kept:] <= allowed * largest).all(), "a rank that was cut off is zero"
        worst = ((values[:, :, p].double() - padded).abs() - allowed * largest - tiny).max()
        assert worst <= 0, f"position {i}: {worst} above the allowed error"
        for s in range(T.shape[0]):
            for h in range(T.shape[1]):
                sigma = expected[s, h]
                scale = largest[s, h, 0]
                if ((sigma - tau).abs() > allowed * scale).all():
                    assert counts[s, h, p] == (sigma > tau).sum(), f"position {i}"
                if sigma[0] == 0 or sigma[0] > max(tiny, 0.0 if magnitudes is None else 1e-4 * scale):
                    size = entropy_size(sigma)
                    assert math.isclose(entropies[s, h, p].item(), size, rel_tol=1e-5), f"position {i}"
