"""Writes everything that was measured as JSON lines, to a file that outlives the run and that any tool can read.

Each line is one object: `schema_version`, `event`, `timestamp_seconds`, `run` (the run's name) and `data` (the record).
The events are `run_started` (RunInfo), `measurement` (Measurement), `finding` (Finding), `action` (Action) and
`run_finished` (the last Snapshot). Findings and actions are also inside their measurement, but as lines of their own
`grep -E '"event":"(finding|action)"'` finds them.
`ess_monitor.exporters.read_event_log` reads the file; `docs/event-log.schema.json` is its JSON Schema.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field

from ess_monitor import validation
from ess_monitor.errors import ExporterError, format_error
from ess_monitor.exporters.base import final_snapshot
from ess_monitor.exporters.event_log.events import (
    ActionEvent,
    Event,
    FindingEvent,
    MeasurementEvent,
    RunFinishedEvent,
    RunStartedEvent,
    encode_event,
)
from ess_monitor.exporters.event_log.rotating_file import LineFile
from ess_monitor.records import Measurement, RunInfo, RunStatus, Snapshot
from ess_monitor.runtime.files import require_regular
from ess_monitor.validation.settings import Settings


class EventLogConfig(Settings):
    """Settings of the event log."""

    kind: Literal["event_log"] = "event_log"
    """Which exporter this is."""
    path: Path = Path("runs/ess_events.jsonl")
    """The file. Missing folders are created, and an existing file is continued, so that a resumed run keeps one
    history. The default is in `runs/`, as TensorBoard's is."""
    max_bytes: int = Field(default=256 * 2**20, ge=4096)
    """Size at which the file is renamed to `<name>.1` (replacing an older one) and a new one begins. 256 MiB holds some
    ten thousand measurements of 24 layers, more than a long run makes, and a forgotten run cannot fill a disk."""


class EventLogExporter:
    """Appends one JSON line per event and hands each to the operating system at once.

    A line that cannot be written whole (a full disk) raises, so the hub counts it; the next event starts on a new line,
    and readers skip the torn one.

    Args:
        config: path, and largest size.
        clock: seconds since the epoch, for the lines whose records carry no time.
    """

    name = "event_log"
    inline = False

    def __init__(self, config: EventLogConfig | None = None, clock: Callable[[], float] = time.time) -> None:
        self.config = validation.optional("config", config, EventLogConfig) or EventLogConfig()
        self._clock = validation.function("clock", clock)
        self._file: LineFile | None = None
        self._run: RunInfo | None = None
        self._snapshot: Callable[[], Snapshot] | None = None

    @property
    def shown_by(self) -> str:
        """Where the log is, and the command that draws it."""
        return f"event log: {self.config.path}; draw it with: ess-monitor report {shlex.quote(str(self.config.path))}"

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """Open the file and write `run_started`.

        Raises:
            ExporterError: the path cannot be created, opened or written, or is no file.
        """
        file = LineFile(self.config.path)
        try:
            require_regular(self.config.path)
            file.open()
            file.write(self._started_line(run))
        except OSError as error:
            file.close()
            raise ExporterError(
                f"event_log.path={str(self.config.path)!r} cannot be written ({format_error(error)}). "
                "Give a path in a folder this process may write to, or leave `event_log` out of `exporters`."
            ) from error
        self._file, self._run, self._snapshot = file, run, snapshot

    def export(self, measurement: Measurement) -> None:
        """Write the measurement, its findings and its actions. Raises OSError when they cannot be written."""
        if self._run is None:
            return
        when, name = measurement.timestamp_seconds, self._run.run_name
        events: list[Event] = [MeasurementEvent(timestamp_seconds=when, run=name, data=measurement)]
        events += [FindingEvent(timestamp_seconds=when, run=name, data=finding) for finding in measurement.findings]
        events += [ActionEvent(timestamp_seconds=when, run=name, data=action) for action in measurement.actions]
        for event in events:
            self._write(event)

    def close(self, status: RunStatus) -> None:
        """Write `run_finished` with the final counters and close the file."""
        file, run, snapshot = self._file, self._run, self._snapshot
        if file is None or run is None or snapshot is None:
            return
        try:
            final = final_snapshot(snapshot, status)
            self._write(RunFinishedEvent(timestamp_seconds=self._clock(), run=run.run_name, data=final))
        finally:
            file.close()
            self._file = self._run = self._snapshot = None

    def _write(self, event: Event) -> None:
        file, run = self._file, self._run
        assert file is not None
        assert run is not None
        # Every file begins with the run, so that it can be read alone, also where another process has started it.
        file.write(encode_event(event), max_bytes=self.config.max_bytes, heading=lambda: self._started_line(run))

    def _started_line(self, run: RunInfo) -> bytes:
        return encode_event(RunStartedEvent(timestamp_seconds=self._clock(), run=run.run_name, data=run))
