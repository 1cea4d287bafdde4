"""One exporter behind a guard: whatever it raises is counted, logged once, and never reaches the training."""

from __future__ import annotations

import logging
import threading

from ess_monitor.errors import described
from ess_monitor.exporters.base import Exporter
from ess_monitor.records import Measurement, RunStatus

logger = logging.getLogger("ess_monitor.exporters")

_BACK_ON = "To have it back, mend the sink and restart the run."


class Guard:
    """Calls an exporter, counts its errors, and turns it off after too many in a row.

    Args:
        name: the exporter's name in this run (unique; the key of every count).
        exporter: what is guarded.
        max_consecutive_errors: this many failures without a success in between turn the exporter off.
    """

    def __init__(self, name: str, exporter: Exporter, max_consecutive_errors: int) -> None:
        self.name = name
        self.exporter = exporter
        self._max_consecutive_errors = max_consecutive_errors
        # The counts are written by the exporter's thread and by the training thread, and read by scrapes.
        self._lock = threading.Lock()
        self._errors = 0
        self._dropped = 0
        self._consecutive = 0
        self._off = False
        self._closed = False
        self._said: set[str] = set()
        self._pending: BaseException | None = None

    @property
    def open(self) -> bool:
        """False once the exporter is off."""
        return not self._off

    @property
    def errors(self) -> int:
        """Calls that raised."""
        return self._errors

    @property
    def dropped(self) -> int:
        """Measurements that never reached the exporter."""
        return self._dropped

    def deliver(self, measurement: Measurement) -> None:
        """Hand over one measurement, or count it as dropped when the exporter is off or closed."""
        if self._off or self._closed:
            self.drop(1)
            return
        try:
            self.exporter.export(measurement)
        except Exception as error:
            self.failed(error)
        else:
            self._consecutive = 0

    def failed(self, error: BaseException) -> None:
        """Count an error of `export`; turn the exporter off when it was one too many."""
        with self._lock:
            self._errors += 1
            self._pending = self._pending or error.with_traceback(None)
        self._consecutive += 1
        self._say_once(
            "error",
            f"exporter {self.name!r} failed: {described(error)}. The training goes on; further errors are only counted "
            f"(export_errors_total), and {self._max_consecutive_errors} in a row turn this exporter off.",
        )
        if self._consecutive >= self._max_consecutive_errors and not self._off:
            self._off = True
            self._say_once(
                "off",
                f"exporter {self.name!r} is turned off after {self._consecutive} errors in a row, the last one "
                f"{described(error)}. Its further measurements are dropped and counted (export_dropped_total). "
                f"{_BACK_ON}",
            )

    def take_error(self) -> BaseException | None:
        """The first error of `export` since the last call, without its traceback."""
        with self._lock:
            pending, self._pending = self._pending, None
        return pending

    def drop(self, count: int, why: str = "") -> None:
        """Count measurements that will not be exported; `why` is logged the first time."""
        with self._lock:
            self._dropped += count
        if why:
            self._say_once(
                "drop",
                f"exporter {self.name!r} drops measurements: {why}. The training goes on; what is dropped is counted "
                "(export_dropped_total).",
            )

    def close(self, status: RunStatus) -> None:
        """Close the exporter; only the first call does anything."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            self.exporter.close(status)
        except Exception as error:
            with self._lock:
                self._errors += 1
            logger.warning(
                "exporter %r did not close cleanly: %s. What it had not yet written may be lost.",
                self.name,
                described(error),
            )

    def _say_once(self, topic: str, message: str) -> None:
        with self._lock:
            if topic in self._said:
                return
            self._said.add(topic)
        logger.warning("%s", message)
