"""A ratio of every layer over the steps, as a heat map and as numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter

from ess_monitor.records import layer_title
from ess_monitor.report.components import Table, cell, evenly
from ess_monitor.report.figures import UNITS, Scale, Tick, x_ticks
from ess_monitor.report.history import RunHistory
from ess_monitor.report.summary import ATTENTION, percent

LEVELS = 11
"""Number of colors of the scale."""
CELLS_OF_A_ROW = 240
"""Largest number of cells of a row; each is a stretch of steps, and more would be finer than the screen."""
_COLUMNS_OF_A_TABLE = 12

Stretch = tuple[float, float]
"""Start and end, in units of the plot area."""


@dataclass(frozen=True)
class Cell:
    """A stretch of steps in one color; `start` and `width` are in units of the plot area."""

    start: float
    width: float
    kind: str
    """Level `0`..`10`, or the name of a condition."""


@dataclass(frozen=True)
class HeatRow:
    """The heat map's row of one layer."""

    title: str
    cells: tuple[Cell, ...]
    conditions: tuple[Cell, ...]
    """Where the layer was in a condition that needs attention."""
    text: str
    """First, last, lowest and highest value, for screen readers."""


@dataclass(frozen=True)
class HeatMap:
    """All layers over one axis of steps."""

    rows: tuple[HeatRow, ...]
    ticks: tuple[Tick, ...]


def heat_map(history: RunHistory, quantity: str, scale: Scale) -> HeatMap | None:
    """Draw a field of `Reading` between 0 and 1 for every layer; None where no layer has it."""
    stretches = _stretches([measurement.step for measurement in history.measurements], scale)
    rows = tuple(_row(history, layer, quantity, stretches) for layer in history.layers)
    return HeatMap(rows, x_ticks(scale)) if any(row.cells for row in rows) else None


def ratio_table(history: RunHistory, quantity: str, caption: str) -> Table:
    """Return the same field of every layer as numbers, at evenly spaced measurements."""
    steps = [each.step for each in evenly(history.measurements, _COLUMNS_OF_A_TABLE)]
    rows = []
    for layer in history.layers:
        values = dict(history.series(layer, quantity))
        rows.append((layer_title(layer), *(cell(values.get(step)) for step in steps)))
    return Table(caption, ("layer", *(f"step {step}" for step in steps)), tuple(rows))


def level(ratio: float) -> int:
    """Return the color of a ratio.

    >>> level(0.0), level(0.5), level(1.7)
    (0, 5, 10)
    """
    return round(min(max(ratio, 0.0), 1.0) * (LEVELS - 1))


def _row(history: RunHistory, layer: str, quantity: str, stretches: Sequence[Stretch]) -> HeatRow:
    values = dict(history.series(layer, quantity))
    ratios = [values.get(each.step) for each in history.measurements]
    conditions = [each.conditions.get(layer) for each in history.measurements]
    return HeatRow(
        layer_title(layer),
        _merged((stretch, None if mean is None else str(level(mean))) for stretch, mean in _binned(stretches, ratios)),
        _merged(zip(stretches, (value if value in ATTENTION else None for value in conditions), strict=True)),
        _text(list(values.values())),
    )


def _stretches(steps: Sequence[int], scale: Scale) -> list[Stretch]:
    """Give each step the part of the axis that is nearer to it than to its neighbors."""
    places = [UNITS * scale.place(step) for step in steps]
    if len(places) == 1:
        return [(0.0, UNITS)]
    between = [(left + right) / 2 for left, right in pairwise(places)]
    return list(pairwise([*places[:1], *between, *places[-1:]]))


def _binned(stretches: Sequence[Stretch], ratios: Sequence[float | None]) -> Iterator[tuple[Stretch, float | None]]:
    """Join neighbors into at most `CELLS_OF_A_ROW` bins, each with the mean of its ratios."""
    size = max(math.ceil(len(stretches) / CELLS_OF_A_ROW), 1)
    for first in range(0, len(stretches), size):
        group = stretches[first : first + size]
        known = [ratio for ratio in ratios[first : first + size] if ratio is not None]
        yield (group[0][0], group[-1][1]), sum(known) / len(known) if known else None


def _merged(stretches: Iterable[tuple[Stretch, str | None]]) -> tuple[Cell, ...]:
    """Join neighbors of one kind into one cell, and leave out what has no kind."""
    cells = []
    for kind, group in groupby(stretches, key=itemgetter(1)):
        parts = [stretch for stretch, _ in group]
        start, end = parts[0][0], parts[-1][1]
        if kind is not None and end > start:
            cells.append(Cell(round(start, 1), round(end - start, 1), kind))
    return tuple(cells)


def _text(ratios: Sequence[float]) -> str:
    if not ratios:
        return "not measured"
    first, last = percent(ratios[0]), percent(ratios[-1])
    return f"{first} at first, {last} at the end, lowest {percent(min(ratios))}, highest {percent(max(ratios))}"
