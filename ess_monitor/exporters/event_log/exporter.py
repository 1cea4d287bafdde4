"""JSON lines: everything that was measured, in a file that outlives the run and that any tool can read.

One object a line: `schema_version`, `event`, `timestamp_seconds`, `run` (the run's name) and `data` (the record). The
events are `run_started` (RunInfo), `measurement` (Measurement), `finding` (Finding), `action` (Action) and
`run_finished` (the last Snapshot). Findings and actions are also inside their measurement, but one line each makes
`grep -E '"event":"(finding|action)"'` the report of a run.
`ess_monitor.exporters.read_event_log` reads it back; `docs/event-log.schema.json` is its JSON Schema.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ess_monitor import validation
from ess_monitor.errors import ExporterError
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


class EventLogConfig(BaseModel):
    """Settings of the event log."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["event_log"] = "event_log"
    """Which exporter this is."""
    path: Path = Path("runs/ess_events.jsonl")
    """The file; folders are made, and an existing file is continued, so that a resumed run keeps one history. The
    default lies in `runs/`, where TensorBoard's own default is."""
    max_bytes: int = Field(default=256 * 2**20, ge=4096)
    """Size at which the file is renamed to `<name>.1` (replacing an older one) and begun anew. 256 MiB holds some ten
    thousand measurements of 24 layers, more than a long run makes, and keeps a forgotten run from filling a disk."""


class EventLogExporter:
    """Appends one JSON line per event and hands each to the operating system at once.

    A line that could not be written whole (a full disk) raises, so the hub counts it; the next line starts on a fresh
    line, and readers skip the torn one.

    Args:
        config: where, and how large it may grow.
        clock: seconds since the epoch, for the lines that carry no time of their own.
    """

    inline = False

    def __init__(self, config: EventLogConfig | None = None, clock: Callable[[], float] = time.time) -> None:
        self.name = "event_log"
        self.config = validation.optional("config", config, EventLogConfig) or EventLogConfig()
        self._clock = validation.function("clock", clock)
        self._file: LineFile | None = None
        self._run: RunInfo | None = None
        self._snapshot: Callable[[], Snapshot] | None = None

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """Open the file and write `run_started`.

        Raises:
            ExporterError: the path cannot be created, opened or written.
        """
        file = LineFile(self.config.path)
        try:
            file.open()
            file.write(self._started_line(run))
        except OSError as error:
            file.close()
            raise ExporterError(
                f"event_log.path={str(self.config.path)!r} cannot be written ({type(error).__name__}: {error}). "
                "Give a path in a folder this process may write to, or leave `event_log` out of `exporters`."
            ) from error
        self._file, self._run, self._snapshot = file, run, snapshot

    def export(self, measurement: Measurement) -> None:
        """Write the measurement, its findings and its actions. Raises OSError when the disk does not take them."""
        if self._run is None:
            return
        when, name = measurement.timestamp_seconds, self._run.run_name
        self._write(MeasurementEvent(timestamp_seconds=when, run=name, data=measurement))
        for finding in measurement.findings:
            self._write(FindingEvent(timestamp_seconds=when, run=name, data=finding))
        for action in measurement.actions:
            self._write(ActionEvent(timestamp_seconds=when, run=name, data=action))

    def close(self, status: RunStatus) -> None:
        """Write `run_finished` with the final counters and close the file."""
        file, run, snapshot = self._file, self._run, self._snapshot
        if file is None or run is None or snapshot is None:
            return
        try:
            final = snapshot().model_copy(update={"status": status})
            self._write(RunFinishedEvent(timestamp_seconds=self._clock(), run=run.run_name, data=final))
        finally:
            file.close()
            self._file = self._run = self._snapshot = None

    def _write(self, event: Event) -> None:
        file, run = self._file, self._run
        if file is None or run is None:
            return
        # Each file can be read without the other: it begins with the run, also where another process has begun it.
        file.write(encode_event(event), max_bytes=self.config.max_bytes, heading=lambda: self._started_line(run))

    def _started_line(self, run: RunInfo) -> bytes:
        return encode_event(RunStartedEvent(timestamp_seconds=self._clock(), run=run.run_name, data=run))
