"""A ratio of every layer over the steps, as rows of colored cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from ess_monitor.records import Condition
from ess_monitor.report.figures import UNITS, Scale, Tick, x_ticks
from ess_monitor.report.history import RunHistory
from ess_monitor.report.summary import layer_title, percent

LEVELS = 11
"""Colors of the scale, 0 to 10: more than an eye tells apart, few enough to name in a legend."""

CELLS_OF_A_ROW = 240
"""Cells are a stretch of steps each; more than this are finer than the screen."""


MARKED: tuple[Condition, ...] = ("collapsed", "saturated")
"""Conditions that are marked under a row."""


@dataclass(frozen=True)
class Cell:
    """A stretch of steps in one color; `start` and `width` are in units of the plot area."""

    start: float
    width: float
    kind: str
    """Level `0`..`10`, or the name of a condition."""


@dataclass(frozen=True)
class HeatRow:
    """One layer."""

    title: str
    cells: tuple[Cell, ...]
    conditions: tuple[Cell, ...]
    """Where the layer was collapsed or saturated."""
    text: str
    """First, lowest, highest and last value."""


@dataclass(frozen=True)
class HeatMap:
    """All layers over one axis of steps."""

    rows: tuple[HeatRow, ...]
    ticks: tuple[Tick, ...]


def heat_map(story: RunHistory, quantity: str, scale: Scale) -> HeatMap | None:
    """A field of `Reading` between 0 and 1 for every layer; None where no layer has it."""
    rows = tuple(_row(story, layer, quantity, scale) for layer in story.layers)
    return HeatMap(rows, x_ticks(scale)) if any(row.cells for row in rows) else None


def level(ratio: float) -> int:
    """
    >>> level(0.0), level(0.5), level(1.7)
    (0, 5, 10)
    """
    return round(min(max(ratio, 0.0), 1.0) * (LEVELS - 1))


def _row(story: RunHistory, layer: str, quantity: str, scale: Scale) -> HeatRow:
    values = dict(story.series(layer, quantity))
    edges = _edges([measurement.step for measurement in story.measurements], scale)
    cells = [(start, end, values.get(each.step)) for (start, end), each in zip(edges, story.measurements, strict=True)]
    conditions = [
        (start, end, each.conditions.get(layer)) for (start, end), each in zip(edges, story.measurements, strict=True)
    ]
    return HeatRow(
        layer_title(layer),
        _merged([(start, end, None if mean is None else str(level(mean))) for start, end, mean in _binned(cells)]),
        _merged([(start, end, kind if kind in MARKED else None) for start, end, kind in conditions]),
        _text(list(values.values())),
    )


def _edges(steps: list[int], scale: Scale) -> list[tuple[float, float]]:
    """Every step with what lies nearer to it than to its neighbors."""
    places = [UNITS * scale.place(step) for step in steps]
    if len(places) == 1:
        return [(0.0, UNITS)]
    between = [(left + right) / 2 for left, right in pairwise(places)]
    return list(pairwise([*places[:1], *between, *places[-1:]]))


def _binned(cells: list[tuple[float, float, float | None]]) -> list[tuple[float, float, float | None]]:
    """At most `CELLS_OF_A_ROW` cells: means over neighbors; nothing where none of them was measured."""
    size = max(-(-len(cells) // CELLS_OF_A_ROW), 1)
    binned: list[tuple[float, float, float | None]] = []
    for first in range(0, len(cells), size):
        group = cells[first : first + size]
        known = [value for _, _, value in group if value is not None]
        binned.append((group[0][0], group[-1][1], sum(known) / len(known) if known else None))
    return binned


def _merged(cells: Sequence[tuple[float, float, str | None]]) -> tuple[Cell, ...]:
    """Neighbors of one kind as one cell; what has no kind is left out."""
    merged = []
    for kind, group in groupby(cells, key=lambda cell: cell[2]):
        run = list(group)
        width = run[-1][1] - run[0][0]
        if kind is not None and width > 0:
            merged.append(Cell(round(run[0][0], 1), round(width, 1), kind))
    return tuple(merged)


def _text(ratios: list[float]) -> str:
    if not ratios:
        return "not measured"
    first, last = percent(ratios[0]), percent(ratios[-1])
    return f"{first} at first, {last} at the end, lowest {percent(min(ratios))}, highest {percent(max(ratios))}"
