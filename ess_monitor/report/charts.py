"""Charts as numbers: what the templates draw. Nothing here writes markup, so nothing here has to escape.

The plot area is a square of 1000 x 1000 units that the page stretches to whatever room there is (lines keep their
width); marks, labels and dots are placed in percent of it, so that they keep their shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ess_monitor.report.scales import LogScale, Scale, Tick, number, value_scale

UNITS = 1000.0
POINTS_OF_A_LINE = 600
"""More points than a screen has columns say nothing; a line keeps its extremes."""

Pairs = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """What is to be drawn as a line: (x, y) in the order of x."""

    label: str
    kind: str
    """Style class of the line: `a` to `d` are told apart by colour and by dashes, `limit` is thin."""
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
    """A mark on the axis of steps, which leads to its place in the list of events."""

    at: float
    """Percent from the left."""
    label: str
    kind: str
    target: str
    """Id of the element it leads to."""
    text: str
    """What it says to who points at it or hears it."""


@dataclass(frozen=True)
class Chart:
    """One chart."""

    title: str
    summary: str
    """What the chart shows, for who cannot see it."""
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
    y: Scale | LogScale | None = None,
    band: tuple[Pairs, Pairs] | None = None,
    markers: Sequence[Marker] = (),
) -> Chart | None:
    """Lines over a common axis.

    Args:
        title: says what is drawn, with its unit.
        series: one or more; empty ones are left out.
        x: the axis of steps or positions.
        y: the axis of values; by default everything fits, zero included.
        band: lower and upper bound, drawn as an area behind the lines.
        markers: what happened at which step.

    Returns:
        The chart, or None where there is not one value.
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


def x_ticks(scale: Scale, count: int = 4) -> tuple[Tick, ...]:
    """Labels of a horizontal axis of whole numbers."""
    whole = [value for value in scale.ticks(count) if value == int(value)]
    return tuple(Tick(round(100 * scale.place(value), 2), number(value)) for value in whole)


def thin(pairs: Pairs, points: int = POINTS_OF_A_LINE) -> list[tuple[float, float]]:
    """At most about `points` pairs: the lowest and the highest of every stretch, in their order.

    >>> thin([(x, float(x == 50)) for x in range(100)], points=4)
    [(0, 0.0), (1, 0.0), (50, 1.0), (51, 0.0)]
    """
    if len(pairs) <= points:
        return list(pairs)
    stretches = max(points // 2, 1)
    kept: list[tuple[float, float]] = []
    for index in range(stretches):
        part = pairs[index * len(pairs) // stretches : (index + 1) * len(pairs) // stretches]
        low = min(range(len(part)), key=lambda k: part[k][1])
        high = max(range(len(part)), key=lambda k: (part[k][1], k != low, -k))
        kept += [part[k] for k in sorted({low, high})]
    return kept


def _line(series: Series, x: Scale, y: Scale | LogScale) -> Line:
    places = [(x.place(step), 1 - y.place(value)) for step, value in thin(series.pairs)]
    dot = (round(100 * places[0][0], 2), round(100 * places[0][1], 2)) if len(places) == 1 else None
    return Line(series.label, series.kind, _points(places), dot)


def _polygon(band: tuple[Pairs, Pairs], x: Scale, y: Scale | LogScale) -> str:
    lower, upper = ([(x.place(step), 1 - y.place(value)) for step, value in thin(pairs)] for pairs in band)
    return _points([*lower, *reversed(upper)])


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{UNITS * across:.4g},{UNITS * down:.4g}" for across, down in places)


def _summary(series: Series, x_label: str) -> str:
    (first_x, first), (last_x, last) = series.pairs[0], series.pairs[-1]
    values = [value for _, value in series.pairs]
    return (
        f"{series.label}: {number(first)} at {x_label} {number(first_x)}, "
        f"{number(last)} at {x_label} {number(last_x)}, lowest {number(min(values))}, highest {number(max(values))}"
    )
