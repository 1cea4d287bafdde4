"""One operator of every kind, for what holds for all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ess_monitor.ess import Convolution, DenseOperator, DiagonalRecurrence, GatedConvolution, Operator, SoftmaxAttention

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


def _attention() -> Operator:
    return SoftmaxAttention(_randn(SAMPLES, HEADS, LENGTH, 5), _randn(SAMPLES, HEADS, LENGTH, 5))


def _masked_grouped_attention() -> Operator:
    mask = _randn(SAMPLES, 1, LENGTH, LENGTH)
    return SoftmaxAttention(_randn(SAMPLES, HEADS, LENGTH, 5), _randn(SAMPLES, 2, LENGTH, 5), scale=0.7, mask=mask)


KINDS: dict[str, Callable[[], Operator]] = {
    "recurrence": _recurrence,
    "broadcast recurrence": _broadcast_recurrence,
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
