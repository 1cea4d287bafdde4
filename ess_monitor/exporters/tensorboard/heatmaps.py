"""Pictures of a layer over the run: columns are measurements, rows are heads, positions or singular values.

Legend: R rows, T measurements (columns), C = 3 color channels.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ess_monitor.records import Reading

# Dark to bright, lightness rising all the way, so that the order survives grayscale and color-blind eyes.
_ANCHORS = ((0.07, 0.06, 0.24), (0.20, 0.20, 0.55), (0.10, 0.45, 0.60), (0.25, 0.70, 0.45), (0.98, 0.91, 0.20))
_MISSING = (0.5, 0.5, 0.5)
_CELL_PIXELS = 8
_SINGLE_PRECISION = 1e-7
"""Where nothing is a tolerance, what is this much smaller than the largest singular value is dark."""


@dataclass(frozen=True)
class Column:
    """One measurement."""

    cells: Mapping[int, float]
    """row -> value from 0 up; 0 is the darkest color. Empty: the reading says nothing of it."""
    brightest: float = 0.0
    """Value of the brightest color, unless a larger one was seen."""


def heads(reading: Reading) -> Column:
    """Effective size of every head, against the capacity."""
    # Which heads are measured may rotate; without `heads` they are numbered in the order given.
    rows = reading.heads or range(len(reading.per_head))
    return Column(dict(zip(rows, reading.per_head, strict=False)), _capacity(reading))


def positions(reading: Reading) -> Column:
    """Effective size at every measured position of the sequence, against the capacity."""
    return Column(dict(zip(reading.positions, reading.per_position, strict=False)), _capacity(reading))


def spectrum(reading: Reading) -> Column:
    """Powers of ten by which each singular value is above the tolerance: what is not dark is counted by the ESS.

    >>> values = spectrum(Reading(step=0, layer="", status="ok", spectrum=(1.0, 0.1, 1e-5), spectrum_ranks=(1, 2, 3)))
    >>> [round(decades, 3) for decades in values.cells.values()]
    [3.0, 2.0, 0.0]
    """
    dark = reading.tolerance or _SINGLE_PRECISION * max(reading.spectrum, default=0.0)
    decades = [math.log10(value / dark) if value > dark > 0 else 0.0 for value in reading.spectrum]
    return Column(dict(zip(reading.spectrum_ranks, decades, strict=False)), brightest=1.0)


PICTURES: dict[str, Callable[[Reading], Column]] = {
    "ess_heads": heads,
    "ess_positions": positions,
    "ess_spectrum": spectrum,
}
"""Section of the image's tag -> what it shows."""

LEGEND = """\
Pictures of a layer: one column is one measurement, the newest on the right. Gray was not measured.

| tag | rows, from the top | color |
|---|---|---|
| ess_heads | heads or channels | effective state-size: dark is 0, yellow the capacity |
| ess_positions | positions in the sequence, first to last | the same |
| ess_spectrum | singular values, largest to smallest | powers of ten above the tolerance, dark is below it |

Where the capacity grows with the position (softmax attention), and in spectra, yellow is the largest value seen so far.
"""
"""What the image page cannot say beside a picture, as Markdown."""


def colorize(values_RT: Tensor) -> Tensor:
    """Colors of numbers in 0..1; below and above are clipped, NaN is gray.

    Args:
        values_RT: (R, T) floats.

    Returns:
        (3, R, T) floats in 0..1.

    Example:
        >>> colorize(torch.tensor([[0.0, float("nan")]])).shape
        torch.Size([3, 1, 2])
    """
    anchors = torch.tensor(_ANCHORS)
    missing_RT = values_RT.isnan()
    place_RT = values_RT.nan_to_num(0.0).clamp(0.0, 1.0) * (len(_ANCHORS) - 1)
    lower_RT = place_RT.floor().long().clamp(max=len(_ANCHORS) - 2)
    share_RT1 = (place_RT - lower_RT).unsqueeze(-1)
    colors_RTC = anchors[lower_RT] * (1 - share_RT1) + anchors[lower_RT + 1] * share_RT1
    colors_RTC[missing_RT] = torch.tensor(_MISSING)
    return colors_RTC.permute(2, 0, 1)


class History:
    """The last measurements of one layer, bounded in both directions.

    Args:
        read: what of a reading is shown, one of `PICTURES`.
        columns: measurements kept; the oldest goes first.
        rows: rows kept. Of more, evenly spaced ones are chosen; those seen first stay.
    """

    def __init__(self, read: Callable[[Reading], Column], columns: int, rows: int) -> None:
        self._read = read
        self._columns: deque[dict[int, float]] = deque(maxlen=columns)
        self._limit = rows
        self._rows: set[int] = set()
        self._scale = 0.0
        self._dirty = False

    @property
    def changed(self) -> bool:
        """True when a column was added since the last image."""
        return self._dirty

    def add(self, reading: Reading) -> None:
        """Take one reading; one that says nothing of this adds nothing."""
        column = self._read(reading)
        new = sorted(column.cells.keys() - self._rows)
        self._rows.update(_evenly(new, self._limit - len(self._rows)))
        cells = {row: value for row, value in column.cells.items() if row in self._rows}
        if not cells:
            return
        self._columns.append(cells)
        # The scale only grows, so that an image is comparable with the one before.
        self._scale = max(self._scale, column.brightest, *cells.values())
        self._dirty = True

    def values(self) -> Tensor:
        """(R, T) values as a share of the scale; NaN where a row was not measured."""
        scale = self._scale or 1.0
        rows = [[column.get(row, math.nan) / scale for column in self._columns] for row in sorted(self._rows)]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), len(self._columns))

    def image(self) -> Tensor:
        """(3, height, width) picture, one square per row and measurement. Needs at least one column."""
        self._dirty = False
        image_CRT = colorize(self.values())
        return image_CRT.repeat_interleave(_CELL_PIXELS, dim=1).repeat_interleave(_CELL_PIXELS, dim=2)


def _capacity(reading: Reading) -> float:
    """Brightest where it is a constant; what grows with the position would leave a short sequence in the dark."""
    return 0.0 if reading.capacity_grows else reading.state_capacity or 0.0


def _evenly(items: Sequence[int], count: int) -> Sequence[int]:
    """At most `count` of them with even gaps."""
    return items if len(items) <= count else [items[index * len(items) // count] for index in range(count)]
