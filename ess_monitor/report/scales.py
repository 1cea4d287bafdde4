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
