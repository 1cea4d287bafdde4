"""Axes: where a value lies, and which values are written beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tick:
    """A label beside an axis."""

    at: float
    """Percent of the axis, from the left or from the top."""
    label: str


@dataclass(frozen=True)
class Scale:
    """A linear axis from `low` to `high`.

    Example:
        >>> Scale(0.0, 50.0).place(20.0)
        0.4
    """

    low: float
    high: float

    def place(self, value: float) -> float:
        """0..1 along the axis; values outside are moved to its ends."""
        share = (value - self.low) / (self.high - self.low)
        return min(max(share, 0.0), 1.0)

    def ticks(self, count: int = 4) -> tuple[float, ...]:
        """Round values inside the axis, about `count` of them.

        >>> Scale(0.0, 1.0).ticks()
        (0.0, 0.25, 0.5, 0.75, 1.0)
        >>> Scale(0.0, 2000.0).ticks()
        (0.0, 500.0, 1000.0, 1500.0, 2000.0)
        """
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * min((1.0, 2.0, 2.5, 5.0, 10.0), key=lambda size: abs(math.log(size * power / rough)))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return tuple(float(f"{number * step:.12g}") for number in range(first, last + 1))


@dataclass(frozen=True)
class LogScale:
    """A logarithmic axis from `low` to `high`, both above 0.

    Example:
        >>> LogScale(1e-3, 10.0).place(0.1)
        0.5
    """

    low: float
    high: float

    def place(self, value: float) -> float:
        """0..1 along the axis; values outside are moved to its ends."""
        if value <= self.low:
            return 0.0
        return min(math.log(value / self.low) / math.log(self.high / self.low), 1.0)

    def ticks(self, count: int = 4) -> tuple[float, ...]:
        """Powers of ten inside the axis, about `count` of them.

        >>> LogScale(1e-5, 1e3).ticks()
        (1e-05, 0.001, 0.1, 10.0, 1000.0)
        """
        first = math.ceil(math.log10(self.low) - 1e-9)
        last = math.floor(math.log10(self.high) + 1e-9)
        gap = max(round((last - first) / count), 1)
        return tuple(float(f"1e{power}") for power in range(first, last + 1, gap))


def step_scale(first: int, last: int) -> Scale:
    """The axis of steps; a single step has an axis, too."""
    return Scale(float(first), float(max(last, first + 1)))


def value_scale(values: Sequence[float], *, zero: bool = True) -> Scale:
    """An axis on which all values fit, from 0 where `zero` is set, else with a little room on both sides."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-12 * max(abs(high), abs(low), 1.0):
        high = low + max(abs(low), 1.0) * 0.1 if low else 1.0
    room = 0.04 * (high - low)
    return Scale(low if zero and low == 0.0 else low - room, high + room)


def log_scale(values: Sequence[float]) -> LogScale:
    """A logarithmic axis of whole powers of ten on which all values, which are above 0, fit."""
    low = max(math.floor(math.log10(min(values))), -300)
    high = min(math.ceil(math.log10(max(values))), 300)  # a power beyond is no float
    return LogScale(10.0**low, 10.0 ** max(high, low + 1))


def number(value: float) -> str:
    """A number as short as it can be read.

    >>> [number(value) for value in (0.0, 0.25, 1500.0, 25000.0, 1.5e6, 1.5e-5)]
    ['0', '0.25', '1500', '25k', '1.5M', '1.5e-05']
    """
    size = abs(value)
    for power, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= (power if power > 1e3 else 1e4):
            return f"{value / power:.4g}{sign}"
    return f"{value:.4g}"
