"""One exporter behind a guard: whatever it raises is counted, logged once, and never reaches the training."""

from __future__ import annotations

import logging
import threading
from collections import deque

from ess_monitor.errors import format_error
from ess_monitor.exporters.base import Exporter
from ess_monitor.records import Measurement, RunStatus
from ess_monitor.runtime.shutdown import SHUTDOWN_GRACE_SECONDS, TorchThread

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
            f"exporter {self.name!r} failed: {format_error(error)}. The training goes on; further errors are only "
            f"counted (export_errors_total), and {self._max_consecutive_errors} in a row turn this exporter off.",
        )
        if self._consecutive >= self._max_consecutive_errors and not self._off:
            self._off = True
            self._say_once(
                "off",
                f"exporter {self.name!r} is turned off after {self._consecutive} errors in a row, the last one "
                f"{format_error(error)}. Its further measurements are dropped and counted (export_dropped_total). "
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
                format_error(error),
            )

    def _say_once(self, topic: str, message: str) -> None:
        with self._lock:
            if topic in self._said:
                return
            self._said.add(topic)
        logger.warning("%s", message)


class Worker:
    """Delivers measurements to one guarded exporter, in order, from a thread of its own.

    Args:
        guard: the exporter.
        queue_length: measurements that may wait; the newest is dropped and counted when that many do.
    """

    def __init__(self, guard: Guard, queue_length: int) -> None:
        self.guard = guard
        self._queue_length = queue_length
        self._queue: deque[Measurement] = deque()
        self._changed = threading.Condition()
        self._final_status: RunStatus | None = None
        self._thread = TorchThread(self._run, f"ess-monitor-export-{guard.name}", self._leave)

    @property
    def waiting(self) -> int:
        """Measurements in the queue."""
        return len(self._queue)

    @property
    def running(self) -> bool:
        """True until the exporter has been closed."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, measurement: Measurement) -> None:
        """Queue a measurement; never waits."""
        with self._changed:
            fits = len(self._queue) < self._queue_length and self._final_status is None
            if fits:
                self._queue.append(measurement)
                self._changed.notify()
        if not fits:
            self.guard.drop(1, why=f"its queue of {self._queue_length} is full because the sink is too slow or hangs")

    def stop(self, status: RunStatus) -> None:
        """Ask the thread to deliver what is queued, close the exporter and end; returns at once."""
        with self._changed:
            self._final_status = status
            self._changed.notify()

    def discard(self) -> None:
        """Drop and count what is still queued."""
        with self._changed:
            count = len(self._queue)
            self._queue.clear()
        if count:
            self.guard.drop(count, why="the run ended before the sink had taken them")

    def join(self, timeout_seconds: float) -> None:
        """Wait for the thread to end, at most that long."""
        self._thread.join(max(0.0, timeout_seconds))

    def _leave(self) -> float:
        self.stop(self._final_status or "failed")
        self.discard()
        return SHUTDOWN_GRACE_SECONDS

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and self._final_status is None:
                    self._changed.wait()
                measurement = self._queue.popleft() if self._queue else None
                status = self._final_status
            if measurement is not None:
                self._deliver(measurement)
            elif status is not None:
                self.guard.close(status)
                return

    def _deliver(self, measurement: Measurement) -> None:
        try:
            self.guard.deliver(measurement)
        except BaseException as error:  # a sink that calls sys.exit() would otherwise end this thread in silence
            self.guard.failed(error)
