"""The effective size of every head over the run, as an image: rows are heads, columns are measurements.

Legend: H heads (rows), T measurements (columns), C = 3 colour channels.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from ess_monitor.records import Reading

# Dark to bright, lightness rising all the way, so that the order survives greyscale and colour-blind eyes.
_ANCHORS = ((0.07, 0.06, 0.24), (0.20, 0.20, 0.55), (0.10, 0.45, 0.60), (0.25, 0.70, 0.45), (0.98, 0.91, 0.20))
_MISSING = (0.5, 0.5, 0.5)
_CELL_PIXELS = 8


def colourize(values_HT: Tensor) -> Tensor:
    """Colours of numbers in 0..1; below and above are clipped, NaN is grey.

    Args:
        values_HT: (H, T) floats.

    Returns:
        (3, H, T) floats in 0..1.

    Example:
        >>> colourize(torch.tensor([[0.0, float("nan")]])).shape
        torch.Size([3, 1, 2])
    """
    anchors = torch.tensor(_ANCHORS)
    missing_HT = values_HT.isnan()
    place_HT = values_HT.nan_to_num(0.0).clamp(0.0, 1.0) * (len(_ANCHORS) - 1)
    lower_HT = place_HT.floor().long().clamp(max=len(_ANCHORS) - 2)
    share_HT1 = (place_HT - lower_HT).unsqueeze(-1)
    colours_HTC = anchors[lower_HT] * (1 - share_HT1) + anchors[lower_HT + 1] * share_HT1
    colours_HTC[missing_HT] = torch.tensor(_MISSING)
    return colours_HTC.permute(2, 0, 1)


class HeadHistory:
    """The last measurements of one layer's heads, bounded in both directions.

    Args:
        columns: measurements kept; the oldest goes first.
        rows: heads kept; the first ones seen stay.
    """

    def __init__(self, columns: int, rows: int) -> None:
        self._columns: deque[dict[int, float]] = deque(maxlen=columns)
        self._rows = rows
        self._heads: set[int] = set()
        self._scale = 0.0
        self._dirty = False

    @property
    def changed(self) -> bool:
        """True when a column was added since the last image."""
        return self._dirty

    def add(self, reading: Reading) -> None:
        """Take the heads of one reading; one without per-head values adds nothing."""
        # Which heads are measured may rotate; without `heads` they are numbered in the order given.
        heads = reading.heads or tuple(range(len(reading.per_head)))
        column: dict[int, float] = {}
        for head, size in zip(heads, reading.per_head, strict=False):
            if head in self._heads or len(self._heads) < self._rows:
                self._heads.add(head)
                column[head] = size
        if not column:
            return
        self._columns.append(column)
        # The scale only grows, so that an image is comparable with the one before; capacity where it is a constant.
        capacity = 0.0 if reading.capacity_grows else reading.state_capacity or 0.0
        self._scale = max(self._scale, capacity, *column.values())
        self._dirty = True

    def values(self) -> Tensor:
        """(H, T) effective size as a share of the scale; NaN where a head was not measured."""
        heads = sorted(self._heads)
        scale = self._scale or 1.0
        rows = [[column.get(head, float("nan")) / scale for column in self._columns] for head in heads]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(heads), len(self._columns))

    def image(self) -> Tensor:
        """(3, height, width) picture, one square per head and measurement. Needs at least one column."""
        self._dirty = False
        image_CHT = colourize(self.values())
        return image_CHT.repeat_interleave(_CELL_PIXELS, dim=1).repeat_interleave(_CELL_PIXELS, dim=2)
