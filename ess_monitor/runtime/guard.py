"""Nothing of ours may stop a training run.

A guarded block swallows the exceptions of one part of the monitor, counts them, logs the first one, and after repeated
failures turns the part off and says once how to turn it on again.
"""

from __future__ import annotations

import logging
from types import TracebackType

logger = logging.getLogger("ess_monitor")


class Guard:
    """Protects the training from one part of the monitor.

    Example:
        >>> guard = Guard("capture", limit=2)
        >>> with guard:
        ...     pass
        >>> guard.failures, guard.open
        (0, True)
    """

    def __init__(self, part: str, *, limit: int = 5) -> None:
        self.part = part
        self.limit = limit
        self.failures = 0
        """Failures so far."""
        self.last_error = ""
        self._in_a_row = 0
        self._before = 0
        self._off = False

    @property
    def open(self) -> bool:
        """False once the part has turned itself off."""
        return not self._off

    def __enter__(self) -> Guard:
        self._before = self.failures
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if error is None:
            if self.failures == self._before:
                self._in_a_row = 0
            return False
        if not isinstance(error, Exception):
            return False
        self.failed(f"{type(error).__name__}: {error}")
        logger.debug("ess_monitor: failure of %s", self.part, exc_info=error)
        return True

    def failed(self, message: str) -> None:
        """Count a failure that was met elsewhere (in the worker, for example)."""
        self.failures += 1
        self._in_a_row += 1
        self.last_error = message
        if self.failures == 1:
            logger.warning(
                "ess_monitor: %s failed (%s); the training goes on, further failures are counted", self.part, message
            )
        if self._in_a_row >= self.limit and not self._off:
            self._off = True
            logger.warning(
                "ess_monitor: %s failed %d times in a row and is off for the rest of this run; "
                "the last error was: %s. Attach a new monitor to turn it on again.",
                self.part,
                self.limit,
                message,
            )
