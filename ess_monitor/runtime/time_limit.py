"""Says whether a sample that is being computed has time for another layer."""

from __future__ import annotations

import math
from collections.abc import Callable

WALL_PER_CORE_SECOND = 3.0
"""A sample has so many seconds of wall time for each second of a core: where the training fills the cores, the worker
has a part of one only."""


class TimeLimit:
    """Follows the time of one sample. It has some seconds of one core, and three times as many of wall time.

    The first task is always allowed, so that a layer is measured whatever the limit is.

    Args:
        limit_seconds: of one core; None for no limit.
        clock: wall time in seconds.

    Example:
        >>> limit = TimeLimit(10.0, lambda: 0.0)
        >>> limit.allows(30.0)
        True
        >>> limit.spend(4.0, expected_seconds=2.0)
        >>> limit.allows(2.0), limit.allows(4.0)  # tasks take twice as long as expected
        (True, False)
    """

    def __init__(self, limit_seconds: float | None, clock: Callable[[], float]) -> None:
        self._limit, self._clock = limit_seconds, clock
        self._began = clock()
        self._spent = self._expected = 0.0

    def allows(self, expected_seconds: float) -> bool:
        """Return whether a task that is expected to take so long may begin."""
        if self._limit is None or self._expected == 0:
            return True
        # Earlier tasks that took longer than expected make the next one longer; none makes it shorter.
        pace = max(1.0, self._spent / self._expected)
        if self._clock() - self._began > WALL_PER_CORE_SECOND * self._limit:
            return False
        return self._spent + pace * expected_seconds <= self._limit

    def spend(self, seconds: float, *, expected_seconds: float) -> None:
        """Add a task that is done. Seconds that are negative or not finite are those of a clock that is wrong."""
        self._spent += seconds if 0 <= seconds < math.inf else expected_seconds
        self._expected += expected_seconds
