"""Charts as numbers, for the templates to draw. This module writes no markup, so it has nothing to escape.

The plot area is a square of 1000 x 1000 units that the page stretches to the available size; lines keep their width.
Marks, labels and dots are placed in percent of it, so that they keep their shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

UNITS = 1000.0
"""Width and height of the plot area."""
POINTS_OF_A_LINE = 600
"""Largest number of points of a line: a screen has about as many columns."""

Pairs = Sequence[tuple[float, float]]


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
        """Return where a value lies, 0..1 along the axis; values outside are moved to its ends."""
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def ticks(self, count: int = 4) -> tuple[float, ...]:
        """Return round values inside the axis, about `count` of them.

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
        return tuple(float(f"{multiple * step:.12g}") for multiple in range(first, last + 1))


class LogScale(Scale):
    """A logarithmic axis from `low` to `high`, both above 0.

    Example:
        >>> LogScale(1e-3, 10.0).place(0.1)
        0.5
    """

    def place(self, value: float) -> float:
        return Scale(math.log(self.low), math.log(self.high)).place(math.log(max(value, self.low)))

    def ticks(self, count: int = 4) -> tuple[float, ...]:
        """Return powers of ten inside the axis, about `count` of them.

        >>> LogScale(1e-5, 1e3).ticks()
        (1e-05, 0.001, 0.1, 10.0, 1000.0)
        """
        first = math.ceil(math.log10(self.low) - 1e-9)
        last = math.floor(math.log10(self.high) + 1e-9)
        gap = max(round((last - first) / count), 1)
        return tuple(float(f"1e{power}") for power in range(first, last + 1, gap))


def value_scale(values: Sequence[float], *, zero: bool = True) -> Scale:
    """Return an axis that holds all values: from 0 where `zero` is set, else with a margin on both sides."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-12 * max(abs(high), abs(low), 1.0):
        high = low + max(abs(low), 1.0) * 0.1 if low else 1.0
    margin = 0.04 * (high - low)
    return Scale(low if zero and low == 0.0 else low - margin, high + margin)


def log_scale(values: Sequence[float]) -> LogScale:
    """Return a logarithmic axis of whole powers of ten that holds all values; they are above 0."""
    low = max(math.floor(math.log10(min(values))), -300)
    high = min(math.ceil(math.log10(max(values))), 300)  # floats end soon after
    return LogScale(10.0**low, 10.0 ** max(high, low + 1))


@dataclass(frozen=True)
class Series:
    """Data of one line: (x, y) in the order of x."""

    label: str
    kind: str
    """CSS class of the line: `a` to `d` differ in color and dashes, `limit` is thin."""
    pairs: Pairs


@dataclass(frozen=True)
class Line:
    """A line in the plot area."""

    label: str
    kind: str
    points: str
    """`x,y x,y`, as SVG's polyline takes it."""
    dot: tuple[float, float] | None
    """Percent from left and top, for a line of one point."""


@dataclass(frozen=True)
class Marker:
    """A mark on the axis of steps, linked to an entry in the list of events."""

    at: float
    """Percent from the left."""
    label: str
    kind: str
    target: str
    """Id of the linked element."""
    text: str
    """Tooltip, also read by screen readers."""


@dataclass(frozen=True)
class Chart:
    """One chart."""

    title: str
    summary: str
    """The chart in words, for screen readers."""
    lines: tuple[Line, ...]
    band: str
    """A polygon between a lower and an upper bound; empty for none."""
    x_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    markers: tuple[Marker, ...] = ()


def line_chart(
    title: str,
    series: Sequence[Series],
    x: Scale,
    *,
    x_label: str = "step",
    y: Scale | None = None,
    band: tuple[Pairs, Pairs] | None = None,
    markers: Sequence[Marker] = (),
) -> Chart | None:
    """Return a chart of lines over a common axis, or None where no series has a value.

    Args:
        title: names the quantity and its unit.
        series: one or more; empty ones are left out.
        x: the axis of steps or positions.
        y: the axis of values; by default it holds all values and zero.
        band: lower and upper bound, drawn as an area behind the lines.
        markers: events on the axis of steps.
    """
    series = [each for each in series if each.pairs]
    if not series:
        return None
    bounds = [value for pairs in band or () for _, value in pairs]
    y = y or value_scale([value for each in series for _, value in each.pairs] + bounds)
    return Chart(
        title=title,
        summary="; ".join(_summary(each, x_label) for each in series),
        lines=tuple(_line(each, x, y) for each in series),
        band=_polygon(band, x, y) if band and band[0] else "",
        x_label=x_label,
        x_ticks=x_ticks(x),
        y_ticks=tuple(Tick(round(100 * (1 - y.place(value)), 2), number(value)) for value in y.ticks()),
        markers=tuple(markers),
    )


def x_ticks(scale: Scale) -> tuple[Tick, ...]:
    """Return the labels of a horizontal axis, of whole numbers unless it is logarithmic."""
    whole = [value for value in scale.ticks() if value == int(value) or isinstance(scale, LogScale)]
    return tuple(Tick(round(100 * scale.place(value), 2), number(value)) for value in whole)


def thin(pairs: Pairs, points: int = POINTS_OF_A_LINE) -> list[tuple[float, float]]:
    """Return at most about `points` pairs: the lowest and the highest of every stretch, in order.

    >>> thin([(x, float(x == 50)) for x in range(100)], points=4)
    [(0, 0.0), (1, 0.0), (50, 1.0), (51, 0.0)]
    """
    if len(pairs) <= points:
        return list(pairs)
    stretches = max(points // 2, 1)
    kept: list[tuple[float, float]] = []
    for index in range(stretches):
        stretch = pairs[index * len(pairs) // stretches : (index + 1) * len(pairs) // stretches]
        low = min(range(len(stretch)), key=lambda k: stretch[k][1])
        high = max(range(len(stretch)), key=lambda k: (stretch[k][1], k != low, -k))
        kept += [stretch[k] for k in sorted({low, high})]
    return kept


def number(value: float) -> str:
    """Format a number for a label.

    >>> [number(value) for value in (0.0, 0.25, 1500.0, 25000.0, 1.5e6, 1.5e-5)]
    ['0', '0.25', '1500', '25k', '1.5M', '1.5e-05']
    """
    for smallest, power, sign in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= smallest:
            return f"{value / power:.4g}{sign}"
    return f"{value:.4g}"


def _line(series: Series, x: Scale, y: Scale) -> Line:
    places = _places(series.pairs, x, y)
    dot = (round(100 * places[0][0], 2), round(100 * places[0][1], 2)) if len(places) == 1 else None
    return Line(series.label, series.kind, _points(places), dot)


def _polygon(band: tuple[Pairs, Pairs], x: Scale, y: Scale) -> str:
    lower, upper = (_places(pairs, x, y) for pairs in band)
    return _points([*lower, *reversed(upper)])


def _places(pairs: Pairs, x: Scale, y: Scale) -> list[tuple[float, float]]:
    """Return 0..1 from left and top."""
    return [(x.place(step), 1 - y.place(value)) for step, value in thin(pairs)]


def _points(places: Pairs) -> str:
    return " ".join(f"{UNITS * across:.4g},{UNITS * down:.4g}" for across, down in places)


def _summary(series: Series, x_label: str) -> str:
    (first_x, first), (last_x, last) = series.pairs[0], series.pairs[-1]
    values = [value for _, value in series.pairs]
    return (
        f"{series.label}: {number(first)} at {x_label} {number(first_x)}, "
        f"{number(last)} at {x_label} {number(last_x)}, lowest {number(min(values))}, highest {number(max(values))}"
    )
