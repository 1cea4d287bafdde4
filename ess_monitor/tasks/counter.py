"""Draws random numbers by counter: the n-th number of a sample is a hash of (seed, index, n).

There is no state to carry, so a batch is drawn at once and a sample is the same wherever and whenever it is drawn.
The hash is the finalizer of SplitMix64 (Steele, Lea and Flood, 2014), on int64 tensors whose arithmetic wraps; torch's
own generators have no such form, and NumPy is not a dependency of torch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """Return the int64 with the bits of this unsigned 64-bit number."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_STEP = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def random_bits(seed: int, index_B: Tensor, count: int) -> Tensor:
    """Return `count` random integers in 0 .. 2^63 - 1 for every index.

    Args:
        seed: any integer; taken modulo 2^64.
        index_B: (B,) int64.

    Returns:
        (B, count) int64.

    Examples:
        >>> one = random_bits(0, torch.tensor([7]), 4)
        >>> torch.equal(one, random_bits(0, torch.tensor([3, 7]), 9)[1:, :4])
        True
    """
    key = _mix(torch.tensor([_signed(seed)]) + _STEP)
    stream_B1 = _mix(key + index_B[:, None] * _STEP)
    number_C = torch.arange(1, count + 1) * _STEP
    return _mix(stream_B1 + number_C) & ((1 << 63) - 1)


def exponential(bits: Tensor) -> Tensor:
    """Return exponentially distributed float64 of mean 1, from random bits. Never 0 and never infinite.

    Examples:
        >>> [float(f"{value:.2g}") for value in exponential(torch.tensor([0, (1 << 63) - 1]))]
        [37.0, 1.1e-16]
    """
    uniform = ((bits >> 11).double() + 0.5) * 2.0**-52
    return -uniform.log()


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, places: int) -> Tensor:
    """Shift to the right without keeping the sign, unlike torch's own shift."""
    return (x >> places) & ((1 << (64 - places)) - 1)
