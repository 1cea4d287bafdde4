"""One operator of every kind, for what holds for all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ess_monitor.ess import (
    Convolution,
    DeltaRecurrence,
    DenseOperator,
    DiagonalRecurrence,
    GatedConvolution,
    Operator,
    ReadFirstRecurrence,
    SoftmaxAttention,
)

SAMPLES, HEADS, LENGTH = 3, 4, 12


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _recurrence() -> Operator:
    shape = (SAMPLES, HEADS, LENGTH, 3)
    return DiagonalRecurrence(-_randn(*shape).abs(), _randn(*shape), _randn(*shape))


def _broadcast_recurrence() -> Operator:
    return DiagonalRecurrence(
        -_randn(1, HEADS, 1, 1).abs(), _randn(SAMPLES, 1, LENGTH, 3), _randn(SAMPLES, HEADS, LENGTH, 3)
    )


def _read_first() -> Operator:
    shape = (SAMPLES, HEADS, LENGTH, 3)
    return ReadFirstRecurrence(-_randn(*shape).abs(), _randn(*shape), _randn(*shape))


def _keys() -> Tensor:
    return torch.nn.functional.normalize(_randn(SAMPLES, HEADS, LENGTH, 3), dim=-1)


def _delta(log_decay: Tensor, largest_beta: float = 1.0) -> Operator:
    beta = largest_beta * torch.rand(SAMPLES, HEADS, LENGTH, dtype=torch.float64)
    return DeltaRecurrence(log_decay, beta, _keys(), _randn(SAMPLES, HEADS, LENGTH, 3))


def _delta_with_zero_decay() -> Operator:
    log_decay = -_randn(SAMPLES, HEADS, LENGTH, 3).abs()
    return _delta(log_decay.masked_fill(torch.rand_like(log_decay) < 0.1, -torch.inf))


def _broadcast_delta() -> Operator:
    beta = torch.rand(1, HEADS, 1, dtype=torch.float64)
    return DeltaRecurrence(-_randn(1, 1, 1, 3).abs(), beta, _keys()[:1], _randn(SAMPLES, 1, LENGTH, 3))


def _rwkv7() -> Operator:
    shape = (SAMPLES, HEADS, LENGTH, 3)
    keys = _keys()
    left = keys * torch.rand(shape, dtype=torch.float64)
    return DeltaRecurrence.diagonal_plus_rank_one(
        -0.6 * torch.rand(shape, dtype=torch.float64), left, -keys, _randn(*shape), _randn(*shape)
    )


def _attention() -> Operator:
    return SoftmaxAttention(_randn(SAMPLES, HEADS, LENGTH, 5), _randn(SAMPLES, HEADS, LENGTH, 5))


def _masked_grouped_attention() -> Operator:
    mask = _randn(SAMPLES, 1, LENGTH, LENGTH)
    return SoftmaxAttention(_randn(SAMPLES, HEADS, LENGTH, 5), _randn(SAMPLES, 2, LENGTH, 5), scale=0.7, mask=mask)


KINDS: dict[str, Callable[[], Operator]] = {
    "recurrence": _recurrence,
    "broadcast recurrence": _broadcast_recurrence,
    "recurrence that is read first": _read_first,
    "delta rule": lambda: _delta(torch.zeros(1, 1, 1, 1, dtype=torch.float64)),
    "delta rule, scalar decay": lambda: _delta(-_randn(SAMPLES, HEADS, LENGTH, 1).abs()),
    "delta rule, diagonal decay": lambda: _delta(-_randn(SAMPLES, HEADS, LENGTH, 3).abs()),
    "delta rule, negative eigenvalues": lambda: _delta(-_randn(SAMPLES, HEADS, LENGTH, 1).abs(), 2.0),
    "delta rule, decays of zero": _delta_with_zero_decay,
    "broadcast delta rule": _broadcast_delta,
    "diagonal plus rank one": _rwkv7,
    "attention": _attention,
    "masked grouped attention": _masked_grouped_attention,
    "convolution": lambda: Convolution(_randn(SAMPLES, HEADS, 5), LENGTH),
    "long convolution": lambda: Convolution(_randn(SAMPLES, HEADS, LENGTH)),
    "gated convolution": lambda: GatedConvolution(
        _randn(SAMPLES, HEADS, LENGTH), _randn(1, HEADS, 4), _randn(SAMPLES, HEADS, LENGTH)
    ),
    "dense": lambda: DenseOperator(_randn(SAMPLES, HEADS, LENGTH, LENGTH).tril()),
    "dense blocks": lambda: DenseOperator(_randn(SAMPLES, HEADS, 2 * LENGTH, 2 * LENGTH), block_size=2),
}
