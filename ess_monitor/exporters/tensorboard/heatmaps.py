"""Draws heat maps over the run: columns are measurements; rows are layers, or heads, positions or ranks of one.

Legend: R rows, T measurements (columns), C = 3 color channels.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ess_monitor.records import COLOR_SCALE, Reading

_ANCHORS = tuple(tuple(channel / 255 for channel in bytes.fromhex(color[1:])) for color in COLOR_SCALE)
_MISSING = (0.5, 0.5, 0.5)
_CELL_PIXELS = 8
LEAST_HEIGHT_PIXELS = 128
"""Height of the map of all layers, of which there may be few."""
_SINGLE_PRECISION = 1e-7
"""Without a tolerance, singular values below this share of the largest one are dark."""


@dataclass(frozen=True)
class HeatmapColumn:
    """Holds the values of one measurement."""

    cells: Mapping[int, float]
    """Values from 0 up by row; 0 is the darkest color. Empty: the reading has none."""
    brightest: float = 0.0
    """Value of the brightest color, unless a larger one has been seen."""


def heads(reading: Reading) -> HeatmapColumn:
    """Return the effective size of every head; the capacity is brightest."""
    # The measured heads may rotate; without `heads` they are numbered in order.
    rows = reading.heads or range(len(reading.per_head))
    return HeatmapColumn(dict(zip(rows, reading.per_head, strict=False)), _capacity(reading))


def positions(reading: Reading) -> HeatmapColumn:
    """Return the effective size at every measured position of the sequence; the capacity is brightest."""
    return HeatmapColumn(dict(zip(reading.positions, reading.per_position, strict=False)), _capacity(reading))


def spectrum(reading: Reading) -> HeatmapColumn:
    """Return the powers of ten by which each singular value exceeds the tolerance; the ESS does not count dark ones.

    >>> values = spectrum(Reading(step=0, layer="", status="ok", spectrum=(1.0, 0.1, 1e-5), spectrum_ranks=(1, 2, 3)))
    >>> [round(decades, 3) for decades in values.cells.values()]
    [3.0, 2.0, 0.0]
    """
    dark = reading.tolerance or _SINGLE_PRECISION * max(reading.spectrum, default=0.0)
    decades = [math.log10(value / dark) if value > dark > 0 else 0.0 for value in reading.spectrum]
    return HeatmapColumn(dict(zip(reading.spectrum_ranks, decades, strict=False)), brightest=1.0)


def layers(readings: Iterable[Reading], places: Mapping[str, int]) -> HeatmapColumn:
    """Return the utilization of every layer by its place in the model; a full state is brightest."""
    measured = [each for each in readings if each.layer in places and each.utilization_ratio is not None]
    return HeatmapColumn({places[each.layer]: min(each.utilization_ratio or 0.0, 1.0) for each in measured}, 1.0)


PICTURES: dict[str, Callable[[Reading], HeatmapColumn]] = {
    "ess_heads": heads,
    "ess_positions": positions,
    "ess_spectrum": spectrum,
}
"""What a heat map shows, by the section of its tag."""

LEGEND = """\
Charts of every layer, with bounds, and of the loss beside them, are on the page CUSTOM SCALARS. TensorBoard has one
color for a run: in a chart of all layers, point at a line to see whose it is.

In pictures one column is one measurement, the newest on the right. Gray was not measured.

| tag | rows, from the top | color |
|---|---|---|
| ess | layers, in the order of the model: {layers} | utilization: dark is 0, yellow a full state |
| ess_heads | heads or channels | effective state-size: dark is 0, yellow the capacity |
| ess_positions | positions in the sequence, first to last | the same |
| ess_spectrum | singular values, largest to smallest | powers of ten above the tolerance, dark is below it |

Where the capacity grows with the position (softmax attention), and in spectra, yellow is the largest value seen so far.
"""
"""Explanation of the heat maps in Markdown, for the text page: an image has no caption. `layers` is filled in."""


def colorize(values_RT: Tensor) -> Tensor:
    """Return the colors of numbers; they are clipped to 0..1, and NaN is gray.

    Args:
        values_RT: (R, T) floats.

    Returns:
        (3, R, T) floats in 0..1.

    Examples:
        >>> colorize(torch.tensor([[0.0, float("nan")]])).shape
        torch.Size([3, 1, 2])
    """
    anchors = torch.tensor(_ANCHORS)
    missing_RT = values_RT.isnan()
    anchor_RT = values_RT.nan_to_num(0.0).clamp(0.0, 1.0) * (len(_ANCHORS) - 1)
    lower_RT = anchor_RT.floor().long().clamp(max=len(_ANCHORS) - 2)
    blend_RT1 = (anchor_RT - lower_RT).unsqueeze(-1)
    colors_RTC = anchors[lower_RT] * (1 - blend_RT1) + anchors[lower_RT + 1] * blend_RT1
    colors_RTC[missing_RT] = torch.tensor(_MISSING)
    return colors_RTC.permute(2, 0, 1)


class Heatmap:
    """Keeps and draws the last measurements, up to a number of columns and rows.

    Args:
        columns: measurements kept; the oldest is dropped first.
        rows: rows kept. Of more, evenly spaced ones are chosen; those seen first stay.
        least_height: pixels of the picture; rows become higher than wide where there are few.
    """

    def __init__(self, columns: int, rows: int, least_height: int = 0) -> None:
        self._least_height = least_height
        self._columns: deque[dict[int, float]] = deque(maxlen=columns)
        self._max_rows = rows
        self._rows: set[int] = set()
        self._scale = 0.0
        self.changed = False
        """True when a column was added since the last image."""

    def add(self, column: HeatmapColumn) -> None:
        """Add a column, if it has a value."""
        new = sorted(column.cells.keys() - self._rows)
        self._rows.update(_evenly(new, self._max_rows - len(self._rows)))
        cells = {row: value for row, value in column.cells.items() if row in self._rows}
        if not cells:
            return
        self._columns.append(cells)
        # The scale only grows, so that an image is comparable with the one before.
        self._scale = max(self._scale, column.brightest, *cells.values())
        self.changed = True

    def values(self) -> Tensor:
        """Return (R, T) values as a share of the scale; NaN where a row was not measured."""
        scale = self._scale or 1.0
        rows = [[column.get(row, math.nan) / scale for column in self._columns] for row in sorted(self._rows)]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), len(self._columns))

    def image(self) -> Tensor:
        """Return the picture (3, height, width), one square per row and measurement. Needs at least one column."""
        self.changed = False
        image_CRT = colorize(self.values())
        height = max(_CELL_PIXELS, self._least_height // image_CRT.shape[1])
        return image_CRT.repeat_interleave(height, dim=1).repeat_interleave(_CELL_PIXELS, dim=2)


def _capacity(reading: Reading) -> float:
    # A capacity that grows with the position would leave short sequences dark.
    return 0.0 if reading.capacity_grows else reading.state_capacity or 0.0


def _evenly(items: Sequence[int], count: int) -> Sequence[int]:
    """Return at most `count` of the items, evenly spaced."""
    return items if len(items) <= count else [items[index * len(items) // count] for index in range(count)]
