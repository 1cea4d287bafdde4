"""Nothing of ours may stop a training run.

A guarded block swallows the exceptions of one part of the monitor, counts them, logs the first one, and after repeated
failures turns the part off and says once how to turn it on again. A strict guard also keeps the first one, to be raised
where the training can see it.
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

    Used as a block it stands around one unit of the part's work: `limit` failures in a row turn the part off, a unit
    that ends well in between starts the count anew. Of blocks inside each other the outermost is the unit.

    Args:
        part: its name in log lines and metrics.
        limit: blocks in a row.
        strict: keep the first failure for `raise_pending`.
        advice: how to turn the part on again; logged when it turns itself off.

    Example:
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
        self.failures = 0
        """Failures so far."""
        self.last_error = ""
        self._strict = strict
        self._advice = validation.instance("advice", advice, str)
        self._pending: PartError | None = None
        self._in_a_row = 0
        self._depth = 0
        self._clean = True
        self._off = False

    @property
    def open(self) -> bool:
        """False once the part has turned itself off."""
        return not self._off

    def __enter__(self) -> Guard:
        self._clean = self._clean or self._depth == 0
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._depth -= 1
        if error is None:
            if self._depth == 0 and self._clean:
                self._in_a_row = 0
            return False
        return self._swallow(error)

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """A block around the beginning of a unit of work, whose end is another block.

        A failure counts as any other; an end without one says nothing of the unit yet, and leaves the count in a row.
        """
        try:
            yield
        except BaseException as error:
            if not self._swallow(error):
                raise

    def count(self, message: str, cause: BaseException | None = None) -> None:
        """Count a failure for which the part is not to blame as a whole: that of one layer, for example.

        It is logged if it is the first, and never turns the part off. Safe to call from any thread.
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
        """Turn the part off for the rest of the run, and say so once.

        Args:
            why: the reason, and how it is turned on again; sentences.
        """
        if not self._off:
            self._off = True
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
        self._clean = False
        message = format_error(error)
        self.count(message, error)
        self._in_a_row += 1
        if self._in_a_row >= self.limit:
            self.turn_off(f"it failed {self.limit} times in a row, the last error was: {message}. {self._advice}")
        return True


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
        self.limit = validation.whole("limit", limit, 1)
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
