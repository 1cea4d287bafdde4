"""Keeps one exporter's errors and delays away from the training."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from queue import SimpleQueue

from ess_monitor.errors import ExporterError, format_error
from ess_monitor.exporters.base import Exporter
from ess_monitor.records import Measurement, RunStatus
from ess_monitor.runtime.guard import Guard
from ess_monitor.runtime.shutdown import SHUTDOWN_GRACE_SECONDS, TorchThread

logger = logging.getLogger("ess_monitor.exporters")

_ADVICE = (
    "Its further measurements are dropped and counted (export_dropped_total). Fix the sink and restart the run to turn "
    "it on again."
)


class ExporterChannel:
    """Delivers measurements to one exporter, in order, and turns it off after too many errors in a row.

    An exporter with `inline = True` is called on the calling thread; any other has a bounded queue and a daemon thread.

    No lock is held anywhere: a signal handler may close the run while its own thread, which then stands still, is at
    any line of this class. An inline exporter that is just being called is closed when that call returns.

    Args:
        name: the exporter's name in this run (unique; the key of every count).
        exporter: receives the measurements.
        queue_length: measurements that may wait; when the queue is full, the newest is dropped and counted.
        max_consecutive_errors: errors without a success in between that turn the exporter off.
    """

    def __init__(self, name: str, exporter: Exporter, queue_length: int, max_consecutive_errors: int) -> None:
        self.name = name
        self.exporter = exporter
        self._guard = Guard(f"exporter {name!r}", limit=max_consecutive_errors, advice=_ADVICE)
        self._close_errors = 0
        self._pending: deque[BaseException] = deque(maxlen=1)
        self._queue: deque[Measurement] = deque()
        self._queue_length = queue_length
        self._wake: SimpleQueue[None] = SimpleQueue()
        """One for each measurement that was queued, and one for the end."""
        self._refused, self._undelivered = 0, 0  # each is written by one thread
        self._final_status: RunStatus | None = None
        self._caller: int | None = None
        """Thread that is inside an inline exporter."""
        self._closing = threading.Lock()  # never released: whoever takes it closes
        self._is_closed = False
        self._has_logged_drop = False
        work, thread_name = self._deliver_until_stopped, f"ess-monitor-export-{name}"
        self._thread = None if exporter.inline else TorchThread(work, thread_name, self._hurry)

    @property
    def is_on(self) -> bool:
        """False once the exporter has been turned off."""
        return self._guard.open

    @property
    def is_running(self) -> bool:
        """True while the exporter's own thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def errors(self) -> int:
        """Calls that raised."""
        return self._guard.failures + self._close_errors

    @property
    def dropped(self) -> int:
        """Measurements that never reached the exporter."""
        return self._refused + self._undelivered

    @property
    def waiting(self) -> int:
        """Measurements in the queue."""
        return len(self._queue)

    def take_error(self) -> BaseException | None:
        """Return the first error of `export` since the last call, without its traceback."""
        with contextlib.suppress(IndexError):
            return self._pending.popleft()
        return None

    def start(self) -> None:
        """Start the exporter's own thread, if it has one."""
        if self._thread is not None:
            self._thread.start()

    def put(self, measurement: Measurement) -> None:
        """Export a measurement at once (inline), or queue it without waiting."""
        if self._thread is None:
            self._deliver_inline(measurement)
        elif len(self._queue) < self._queue_length and self._final_status is None:
            self._queue.append(measurement)
            self._wake.put(None)
        else:
            self._refuse(1, f"its queue of {self._queue_length} is full because the sink is too slow or hangs")

    def stop(self, status: RunStatus) -> None:
        """Ask the thread to deliver what is queued, close the exporter and end. Returns at once."""
        self._final_status = self._final_status or status
        self._wake.put(None)

    def close(self, status: RunStatus) -> None:
        """Close the exporter on the calling thread; only the first call does anything."""
        if self._caller is not None or not self._closing.acquire(blocking=False):
            return
        try:
            self._caller = None if self._thread is not None else threading.get_ident()
            self.exporter.close(status)
        except Exception as error:
            self._close_errors += 1
            logger.warning(
                "exporter %r did not close cleanly: %s. What it had not yet written may be lost.",
                self.name,
                format_error(error),
            )
        finally:
            self._caller, self._is_closed = None, True

    def discard(self) -> None:
        """Drop and count what is still queued."""
        count = len(self._queue)
        self._queue.clear()
        if count:
            self._refuse(count, "the run ended before the sink had taken them")

    def join(self, timeout_seconds: float) -> None:
        """Wait at most that long for the exporter's own thread to end, or for another thread to close it."""
        if self._thread is not None:
            self._thread.join(max(0.0, timeout_seconds))
            return
        ends = time.monotonic() + timeout_seconds
        while not self._is_closed and self._caller != threading.get_ident() and time.monotonic() < ends:
            time.sleep(0.005)

    def _deliver_inline(self, measurement: Measurement) -> None:
        if self._caller is not None:  # a signal handler has interrupted the exporter, and called the monitor
            self._refuse(1)
            return
        try:
            self._caller = threading.get_ident()
            self._deliver(measurement)
        finally:
            self._caller = None
            if self._final_status is not None:
                self.close(self._final_status)

    def _deliver_until_stopped(self) -> None:
        while True:
            if self._final_status is None:
                self._wake.get()
            status, measurement = self._final_status, None
            with contextlib.suppress(IndexError):
                measurement = self._queue.popleft()
            if measurement is not None:
                # An error here is one of the log, whose handlers are the user's: the sink is still served and closed.
                with contextlib.suppress(Exception):
                    self._deliver(measurement)
            elif status is not None:
                self.close(status)
                return

    def _deliver(self, measurement: Measurement) -> None:
        if self._closing.locked() or not self._guard.open:
            self._undelivered += 1
            return
        try:
            with self._guard:
                try:
                    self.exporter.export(measurement)
                except BaseException as error:
                    if not self._pending:
                        self._pending.append(error)
                    if isinstance(error, Exception) or self._thread is None:
                        raise
                    # A sink that calls sys.exit() would otherwise end the thread silently.
                    raise ExporterError(format_error(error)) from error
        finally:
            for kept in tuple(self._pending):  # a traceback would keep the frames of the training alive
                kept.__traceback__ = None

    def _refuse(self, count: int, why: str = "") -> None:
        self._refused += count
        if why and not self._has_logged_drop:
            self._has_logged_drop = True
            logger.warning(
                "exporter %r drops measurements: %s. The training goes on; dropped measurements are counted "
                "(export_dropped_total).",
                self.name,
                why,
            )

    def _hurry(self) -> float:
        """Ask the thread to return before the process ends; return the seconds that are worth waiting for it."""
        self.stop(self._final_status or "failed")
        self.discard()
        return SHUTDOWN_GRACE_SECONDS
