"""Independent references: T and y from their definitions, in float64, with loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def recurrence(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    """y by stepping S_t = diag(exp log_decay_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t."""
    decay = torch.ones_like(q) if log_decay is None else log_decay.exp().expand(q.shape)
    state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=q.dtype)
    outputs = []
    for t in range(q.shape[2]):
        state = decay[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((state * q[:, :, t, :, None]).sum(-2))
    return torch.stack(outputs, dim=2)


def scan_operator(q: Tensor, k: Tensor, log_decay: Tensor | None) -> Tensor:
    """T_ij = sum_n q_i[n] exp(sum_{t=j+1..i} log_decay_t[n]) k_j[n], entry by entry."""
    q, k = q.double(), k.double()
    length = q.shape[2]
    steps = torch.zeros_like(q) if log_decay is None else log_decay.double().expand(q.shape)
    operator = torch.zeros(*q.shape[:2], length, length, dtype=torch.float64)
    for i in range(length):
        for j in range(i + 1):
            decay = steps[:, :, j + 1 : i + 1].sum(2).exp()
            operator[:, :, i, j] = (q[:, :, i] * decay * k[:, :, j]).sum(-1)
    return operator


def softmax_operator(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """T = softmax(scale q k^T) row by row over j <= i."""
    scores = scale * q.double() @ k.double().mT
    operator = torch.zeros_like(scores)
    for i in range(scores.shape[-1]):
        weights = (scores[..., i, : i + 1] - scores[..., i, : i + 1].amax(-1, keepdim=True)).exp()
        operator[..., i, : i + 1] = weights / weights.sum(-1, keepdim=True)
    return operator


def watch_core(mixer: nn.Module, inputs: Tensor) -> tuple[tuple[Any, ...], Tensor, Tensor]:
    """Arguments and output of `mixer.core` in one forward pass, and the mixer's own output."""
    seen: list[tuple[tuple[Any, ...], Tensor]] = []
    handle = mixer.core.register_forward_hook(lambda _, args, output: seen.append((args, output)))
    try:
        output = mixer(inputs)
    finally:
        handle.remove()
    [(args, core_output)] = seen
    return args, core_output, output
