"""A circuit breaker for each of several things of one kind: the layers of a model."""

from __future__ import annotations

from collections.abc import Iterable

from ess_monitor import checks


class Breaker:
    """Turns off what fails `limit` times in a row, each by itself: the others go on.

    Args:
        limit: failures without a success in between.

    Example:
        >>> breaker = Breaker(limit=2)
        >>> breaker.failed("a", "no memory"), breaker.failed("a", "no memory"), breaker.failed("a", "no memory")
        (False, True, False)
        >>> breaker.off
        {'a': 'no memory'}
    """

    def __init__(self, *, limit: int = 5) -> None:
        self.limit = checks.whole("limit", limit, 1)
        self.off: dict[str, str] = {}
        """What is off, and its last error. It stays off: only a new breaker turns it on again."""
        self._in_a_row: dict[str, int] = {}

    def succeeded(self, names: Iterable[str]) -> None:
        """These did not fail."""
        for name in names:
            self._in_a_row.pop(name, None)

    def failed(self, name: str, error: str) -> bool:
        """One more failure; True when it is the one that turns `name` off."""
        if name in self.off:
            return False
        self._in_a_row[name] = self._in_a_row.get(name, 0) + 1
        if self._in_a_row[name] < self.limit:
            return False
        self.off[name] = error
        return True
