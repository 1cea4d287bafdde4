"""Hands one measurement to every exporter; none of them can hurt the training or each other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

from ess_monitor import validation
from ess_monitor.errors import ExporterError, format_error
from ess_monitor.exporters.base import Exporter, check_exporters
from ess_monitor.exporters.channel import ExporterChannel, logger
from ess_monitor.records import Measurement, RunInfo, RunStatus, Snapshot

_DRAIN_SHARE = 0.8
"""Share of the closing time that may go into the queues; the rest is kept for flushing and closing the sinks."""


class ExporterHub:
    """Hands every measurement to every exporter.

    `start` is strict: a sink that was asked for and cannot start raises. After that nothing raises: errors are counted
    in `errors` and logged once per exporter, and `max_consecutive_errors` in a row turn that exporter off, which is
    logged too. An exporter with `inline = True` is called at once. Each of the others has a bounded queue and a daemon
    thread of its own; when its queue is full, the newest measurement is dropped and counted in `dropped`.

    Exporters with the same name become `event_log`, `event_log-2`, ... in the order given.

    In a forked child (a DataLoader worker) the hub does nothing: its threads live in the parent only.

    Args:
        exporters: the sinks; may be empty.
        queue_length: measurements that may wait per exporter, at least 1. 64 bridges a pause of hours at the usual
            cadence of one measurement per 100 steps and stays below a few megabytes.
        max_consecutive_errors: errors in a row that turn an exporter off, at least 1.
        clock: seconds that never go back, for the closing deadline.

    Raises:
        ConfigError: a number is below 1.

    Examples:
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
        self._clock = validation.function("clock", clock)
        exporters = check_exporters(exporters)
        names = _unique_names([exporter.name for exporter in exporters])
        self._channels = tuple(
            ExporterChannel(name, exporter, queue_length, max_consecutive_errors)
            for name, exporter in zip(names, exporters, strict=True)
        )
        self._process_id = os.getpid()
        self._is_started = False
        self._is_opening, self._is_closed, self._is_closing = False, False, False

    @property
    def exporters(self) -> tuple[Exporter, ...]:
        """The sinks, in the order given."""
        return tuple(channel.exporter for channel in self._channels)

    @property
    def errors(self) -> dict[str, int]:
        """Calls that raised, per exporter; every name is there from the beginning."""
        return {channel.name: channel.errors for channel in self._channels}

    @property
    def dropped(self) -> dict[str, int]:
        """Measurements that were never exported, per exporter."""
        return {channel.name: channel.dropped for channel in self._channels}

    @property
    def queue_lengths(self) -> dict[str, int]:
        """Measurements that wait, per exporter; always 0 for an inline one."""
        return {channel.name: channel.waiting for channel in self._channels}

    @property
    def off(self) -> tuple[str, ...]:
        """Exporters that have been turned off."""
        return tuple(channel.name for channel in self._channels if not channel.is_on)

    def take_errors(self) -> dict[str, BaseException]:
        """Return the first error of each exporter since the last call."""
        found = {channel.name: channel.take_error() for channel in self._channels}
        return {name: error for name, error in found.items() if error is not None}

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """Start every exporter, in the order given, those that serve at an address first.

        Where they serve (`serves_at`, of an exporter that has it) is in `addresses` of the run that the others get.

        Raises:
            ExporterError: one could not start. Those that had started are closed again.
        """
        if self._is_started or self._is_closed:
            raise ExporterError("this ExporterHub has already been started; build a new one for every run")
        self._is_started = self._is_opening = True
        opened: list[ExporterChannel] = []
        try:
            for channel in sorted(self._channels, key=lambda channel: not hasattr(channel.exporter, "serves_at")):
                try:
                    channel.exporter.start(run, snapshot)
                except ExporterError as error:
                    raise ExporterError(f"exporter {channel.name!r} cannot start: {error}") from error
                except Exception as error:
                    raise ExporterError(
                        f"exporter {channel.name!r} cannot start: {format_error(error)}. "
                        "Fix the sink, or leave it out of `exporters`."
                    ) from error
                opened.append(channel)
                if isinstance(address := getattr(channel.exporter, "serves_at", None), str):
                    run = run.model_copy(update={"addresses": {**run.addresses, channel.name: address}})
            for channel in self._channels:
                channel.start()
        except BaseException:
            self._is_closed = True
            for channel in self._channels:
                channel.stop("failed")
            for channel in reversed(opened):
                channel.close("failed")
            raise
        finally:
            self._is_opening = False

    def export(self, measurement: Measurement) -> None:
        """Hand one measurement to every exporter. Never raises, never waits for a queued exporter."""
        if self._is_open():
            for channel in self._channels:
                channel.put(measurement)

    def close(self, status: RunStatus, timeout_seconds: float = 5.0) -> None:
        """Write what is queued and close every exporter, within `timeout_seconds`; a second call does nothing.

        What a slow sink has not taken by then is dropped and counted; a sink that hangs is left to its daemon thread.
        A call while another one is under way (on another thread, or in a signal handler) does the same, with the first
        one's status, so that all is closed when it returns.
        """
        begin = self._clock()
        while self._is_opening and self._clock() < begin + timeout_seconds:  # on another thread
            time.sleep(0.01)
        if not (self._is_open() or self._is_closing):
            return
        self._is_closing = self._is_closed = True
        for channel in self._channels:
            channel.stop(status)
        for channel in self._channels:
            if channel.exporter.inline:
                channel.close(status)
        for channel in self._channels:
            channel.join(begin + _DRAIN_SHARE * timeout_seconds - self._clock())
        for channel in self._channels:
            if channel.is_running:
                channel.discard()
        for channel in self._channels:
            channel.join(begin + timeout_seconds - self._clock())
            if channel.is_running:
                logger.warning(
                    "exporter %r did not close within %g s and is left behind; its last lines may be missing.",
                    channel.name,
                    timeout_seconds,
                )
        self._conclude()
        self._is_closing = False

    def _conclude(self) -> None:
        """Tell those that ask for it where the output of all is. An exporter that raises here is left alone."""
        lines = tuple(
            line for channel in self._channels if isinstance(line := getattr(channel.exporter, "shown_by", None), str)
        )
        for channel in self._channels:
            conclude = getattr(channel.exporter, "conclude", None)
            if lines and conclude is not None and channel.is_on and not channel.is_running:
                try:
                    conclude(lines)
                except Exception as error:
                    logger.warning(
                        "exporter %r could not say where the output is: %s", channel.name, format_error(error)
                    )

    def _is_open(self) -> bool:
        # In a forked child, locks may be held by a thread that does not exist there: touch none of them.
        return self._is_started and not self._is_closed and os.getpid() == self._process_id


def _unique_names(names: list[str]) -> list[str]:
    """Return the names, with -2, -3, ... appended to repeated ones; names that are taken are skipped.

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
