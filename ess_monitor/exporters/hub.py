"""Fan-out: one measurement in, every exporter served, none able to hurt the training or each other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

from ess_monitor import validation
from ess_monitor.errors import ExporterError
from ess_monitor.exporters.base import Exporter, check_exporters
from ess_monitor.exporters.channel import Guard, Worker, logger
from ess_monitor.records import Measurement, RunInfo, RunStatus, Snapshot

_DRAIN_SHARE = 0.8
"""Share of the closing time that may go into the queues; the rest is kept for flushing and closing the sinks."""


class ExporterHub:
    """Hands every measurement to every exporter.

    `start` is strict: a sink that was asked for and cannot start raises. After that nothing raises: errors are counted
    in `errors`, logged once per exporter, and after `max_consecutive_errors` in a row that exporter is turned off and
    says so. An exporter with `inline = True` is called right away; each of the others has a bounded queue and a daemon
    thread of its own, and when its queue is full the newest measurement is dropped and counted in `dropped`.

    Two exporters with the same name are told apart as `event_log`, `event_log-2`, ... in the order given.

    In a forked child (a DataLoader worker) the hub does nothing: its threads live in the parent only.

    Args:
        exporters: the sinks; may be empty.
        queue_length: measurements that may wait per exporter, at least 1. 64 bridges a pause of hours at the usual
            cadence of one measurement per 100 steps and stays below a few megabytes.
        max_consecutive_errors: errors in a row that turn an exporter off, at least 1.
        clock: seconds that never go back, for the closing deadline.

    Raises:
        ConfigError: a number is below 1.

    Example:
        >>> hub = ExporterHub([])
        >>> hub.errors, hub.dropped, hub.queue_lengths
        ({}, {}, {})
    """

    def __init__(
        self,
        exporters: Iterable[Exporter] = (),
        *,
        queue_length: int = 64,
        max_consecutive_errors: int = 5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        queue_length = validation.whole("queue_length", queue_length, 1, 2**20)
        max_consecutive_errors = validation.whole("max_consecutive_errors", max_consecutive_errors, 1)
        validation.function("clock", clock)
        exporters = check_exporters(exporters)
        names = _unique_names([exporter.name for exporter in exporters])
        self._guards = tuple(
            Guard(name, exporter, max_consecutive_errors) for name, exporter in zip(names, exporters, strict=True)
        )
        self._workers = {guard.name: Worker(guard, queue_length) for guard in self._guards if not guard.exporter.inline}
        self._clock = clock
        self._process_id = os.getpid()
        self._started = False
        self._closed = False

    @property
    def exporters(self) -> tuple[Exporter, ...]:
        """The sinks, in the order given."""
        return tuple(guard.exporter for guard in self._guards)

    @property
    def errors(self) -> dict[str, int]:
        """Calls that raised, per exporter; every name is there from the beginning."""
        return {guard.name: guard.errors for guard in self._guards}

    @property
    def dropped(self) -> dict[str, int]:
        """Measurements that were never exported, per exporter."""
        return {guard.name: guard.dropped for guard in self._guards}

    @property
    def off(self) -> tuple[str, ...]:
        """Exporters that have been turned off."""
        return tuple(guard.name for guard in self._guards if not guard.open)

    def take_errors(self) -> dict[str, BaseException]:
        """The first error of each exporter since the last call."""
        found = {guard.name: guard.take_error() for guard in self._guards}
        return {name: error for name, error in found.items() if error is not None}

    @property
    def queue_lengths(self) -> dict[str, int]:
        """Measurements that wait, per exporter; always 0 for an inline one."""
        return {
            guard.name: self._workers[guard.name].waiting if guard.name in self._workers else 0
            for guard in self._guards
        }

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """Start every exporter, in the order given.

        Raises:
            ExporterError: one could not start. Those that had started are closed again.
        """
        if self._started or self._closed:
            raise ExporterError("this ExporterHub has already been started; build a new one for every run")
        self._started = True
        started: list[Guard] = []
        try:
            for guard in self._guards:
                try:
                    guard.exporter.start(run, snapshot)
                except ExporterError as error:
                    raise ExporterError(f"exporter {guard.name!r} cannot start: {error}") from error
                except Exception as error:
                    raise ExporterError(
                        f"exporter {guard.name!r} cannot start: {type(error).__name__}: {error}. "
                        "Mend the sink, or leave it out of `exporters`."
                    ) from error
                started.append(guard)
            for worker in self._workers.values():
                worker.start()
        except BaseException:
            self._closed = True
            for worker in self._workers.values():
                worker.stop("failed")
            for guard in reversed(started):
                guard.close("failed")
            raise

    def export(self, measurement: Measurement) -> None:
        """Hand one measurement to every exporter. Never raises, never waits for a queued exporter."""
        if not self._started or self._closed or self._in_forked_child():
            return
        for guard in self._guards:
            worker = self._workers.get(guard.name)
            if worker is None:
                guard.deliver(measurement)
            else:
                worker.put(measurement)

    def close(self, status: RunStatus, timeout_seconds: float = 5.0) -> None:
        """Write what is queued and close every exporter, within `timeout_seconds`; a second call does nothing.

        What a slow sink has not taken by then is dropped and counted; a sink that hangs is left to its daemon thread.
        """
        if not self._started or self._closed or self._in_forked_child():
            return
        self._closed = True
        begin = self._clock()
        workers = tuple(self._workers.values())
        for worker in workers:
            worker.stop(status)
        for guard in self._guards:
            if guard.name not in self._workers:
                guard.close(status)
        for worker in workers:
            worker.join(begin + _DRAIN_SHARE * timeout_seconds - self._clock())
        for worker in workers:
            if worker.running:
                worker.discard()
        for worker in workers:
            worker.join(begin + timeout_seconds - self._clock())
            if worker.running:
                logger.warning(
                    "exporter %r did not close within %g s and is left behind; its last lines may be missing.",
                    worker.guard.name,
                    timeout_seconds,
                )

    def _in_forked_child(self) -> bool:
        # Locks may have been held by a thread that does not exist in the child: touch none of them there.
        return os.getpid() != self._process_id


def _unique_names(names: list[str]) -> list[str]:
    """Append -2, -3, ... to repeated names, skipping those that are taken.

    >>> _unique_names(["a", "b", "a", "a-2", "a"])
    ['a', 'b', 'a-3', 'a-2', 'a-4']
    """
    given = set(names)
    unique: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in unique or (number > 1 and candidate in given):
            number += 1
            candidate = f"{name}-{number}"
        unique.append(candidate)
    return unique
