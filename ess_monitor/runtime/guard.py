"""Keeps failures of the monitor away from the training, and turns off what fails repeatedly.

`Guard` protects the training from one part of the monitor: a guarded block swallows exceptions, counts them, logs the
first one, and turns the part off after several in a row. A strict guard also keeps the first one, to be raised where
the training can see it. `Breaker` counts failures in a row per name, so that one layer is turned off and the others go
on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType

from ess_monitor import validation
from ess_monitor.errors import PartError, format_error

logger = logging.getLogger("ess_monitor")


class Guard:
    """Protects the training from one part of the monitor.

    A block stands around one unit of the part's work: `limit` failed units in a row turn the part off, a successful
    unit starts the count anew. Of nested blocks the outermost is the unit.

    Args:
        part: its name in log lines and metrics.
        limit: failures in a row that turn the part off.
        strict: keep the first failure for `raise_pending`.
        advice: how to turn the part on again; logged when it turns itself off.

    Examples:
        >>> guard = Guard("capture", limit=2)
        >>> with guard:
        ...     pass
        >>> guard.failures, guard.open
        (0, True)
    """

    def __init__(
        self,
        part: str,
        *,
        limit: int = 5,
        strict: bool = False,
        advice: str = "Attach a new monitor to turn it on again.",
    ) -> None:
        self.part = validation.instance("part", part, str)
        self.limit = validation.whole("limit", limit, 1)
        self.open = True
        """False once the part is off."""
        self.failures = 0
        self.last_error = ""
        self._strict = strict
        self._advice = validation.instance("advice", advice, str)
        self._pending: PartError | None = None
        self._in_a_row = 0
        self._depth = 0
        self._unit_failed = False

    def __enter__(self) -> Guard:
        if self._depth == 0:
            self._unit_failed = False
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._depth -= 1
        if error is not None:
            return self._swallow(error)
        if self._depth == 0 and not self._unit_failed:
            self._in_a_row = 0
        return False

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Guard the first half of a unit of work whose second half is another block.

        A failure counts as in any other block. A success does not end the count in a row: the unit may still fail.
        """
        try:
            yield
        except BaseException as error:
            if not self._swallow(error):
                raise

    def count(self, message: str, cause: BaseException | None = None) -> None:
        """Count a failure that never turns the whole part off, for example that of one layer.

        It is logged if it is the first. Safe to call from any thread.
        """
        self.failures += 1
        self.last_error = message
        logger.debug("ess_monitor: failure of %s", self.part, exc_info=cause)
        if self.failures == 1:
            logger.warning(
                "ess_monitor: %s failed (%s); the training goes on, further failures are counted", self.part, message
            )
        if self._strict and self._pending is None:
            self._pending = PartError(self.part, message)
            self._pending.__cause__ = cause

    def turn_off(self, why: str) -> None:
        """Turn the part off for the rest of the run, and log it once.

        Args:
            why: the reason, and how to turn the part on again; sentences.
        """
        if self.open:
            self.open = False
            logger.warning("ess_monitor: %s is off for the rest of this run: %s", self.part, why)

    def raise_pending(self) -> None:
        """Raise the first failure since the last call, if the guard is strict and there was one.

        Raises:
            PartError: what failed, from its cause.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            raise pending

    def _swallow(self, error: BaseException) -> bool:
        if not isinstance(error, Exception):
            return False
        self._unit_failed = True
        message = format_error(error)
        self.count(message, error)
        self._in_a_row += 1
        if self._in_a_row >= self.limit:
            self.turn_off(f"it failed {self.limit} times in a row, the last error was: {message}. {self._advice}")
        return True


class Breaker:
    """Turns off each name that fails `limit` times in a row; the others go on.

    Args:
        limit: failures without a success in between.

    Examples:
        >>> breaker = Breaker(limit=2)
        >>> breaker.failed("a", "no memory"), breaker.failed("a", "no memory"), breaker.failed("a", "no memory")
        (False, True, False)
        >>> breaker.off
        {'a': 'no memory'}
    """

    def __init__(self, *, limit: int = 5) -> None:
        self.limit = validation.whole("limit", limit, 1)
        self.off: dict[str, str] = {}
        """Last error of every name that is off. A name stays off: only a new breaker turns it on again."""
        self._in_a_row: dict[str, int] = {}

    def succeeded(self, names: Iterable[str]) -> None:
        """Start the counts of these names anew."""
        for name in names:
            self._in_a_row.pop(name, None)

    def failed(self, name: str, error: str) -> bool:
        """Count a failure; return True when it turns `name` off."""
        if name in self.off:
            return False
        self._in_a_row[name] = self._in_a_row.get(name, 0) + 1
        if self._in_a_row[name] < self.limit:
            return False
        self.off[name] = error
        return True
