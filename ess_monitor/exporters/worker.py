"""The bounded queue and the daemon thread of one exporter: a dead sink holds up nobody else."""

from __future__ import annotations

import threading
from collections import deque

from ess_monitor.exporters.guard import Guard
from ess_monitor.leaving import A_MOMENT, TorchThread
from ess_monitor.records import Measurement, RunStatus


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
        return A_MOMENT

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
