"""One small exchange by which all ranks come to the same numbers.

Every rank measures its own data. A decision that changes the model must be the same everywhere, so at a step that all
ranks know they exchange a few numbers each, over a process group of their own: the training's collectives keep their
order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class Agreement:
    """Exchanges a vector of numbers with all ranks. Must be built, and `exchange` called, by every rank alike.

    Args:
        timeout_seconds: a rank that is later than this makes `exchange` raise on the others.
    """

    def __init__(self, *, timeout_seconds: float = 60.0) -> None:
        self.world_size = dist.get_world_size()
        self._timeout = timedelta(seconds=timeout_seconds)
        self._group: Any = dist.new_group(backend="gloo", timeout=self._timeout)

    def exchange(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's values, by rank. NaN stands for a number that a rank does not have."""
        mine = torch.tensor(list(values), dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine, group=self._group)
        return [values.tolist() for values in everyone]


def agreed_mean(column: Sequence[float]) -> float:
    """Mean over the ranks that have the number; NaN when none has.

    >>> agreed_mean([1.0, float("nan"), 3.0])
    2.0
    """
    present = [value for value in column if not math.isnan(value)]
    return math.fsum(present) / len(present) if present else math.nan
