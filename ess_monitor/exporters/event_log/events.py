"""Defines the lines of the event log as types, and writes and reads them."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ess_monitor import validation
from ess_monitor.errors import ConfigError
from ess_monitor.exporters.event_log.rotating_file import rotated_path
from ess_monitor.records import SCHEMA_VERSION, Action, Finding, Measurement, RunInfo, Snapshot

MAX_LINE_BYTES = 16 * 2**20
"""Longer lines are skipped and never held in memory as a whole; a measurement of 1000 layers takes about one MiB."""


class _EventBase(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Exactly this version: a line of another schema must not be misread.
    schema_version: int = Field(default=SCHEMA_VERSION, ge=SCHEMA_VERSION, le=SCHEMA_VERSION)
    timestamp_seconds: float
    run: str


class RunStartedEvent(_EventBase):
    """Records that a run started or was resumed on this file."""

    event: Literal["run_started"] = "run_started"
    data: RunInfo


class MeasurementEvent(_EventBase):
    """Records one sampled step."""

    event: Literal["measurement"] = "measurement"
    data: Measurement


class FindingEvent(_EventBase):
    """Records that a layer's condition changed."""

    event: Literal["finding"] = "finding"
    data: Finding


class ActionEvent(_EventBase):
    """Records what the autopilot did, would have done, or refused to do."""

    event: Literal["action"] = "action"
    data: Action


class RunFinishedEvent(_EventBase):
    """Records the end of the run, with its status and its final counters."""

    event: Literal["run_finished"] = "run_finished"
    data: Snapshot


Event = RunStartedEvent | MeasurementEvent | FindingEvent | ActionEvent | RunFinishedEvent
"""Any line of the event log."""

EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])
"""Validates one line."""


def encode_event(event: Event) -> bytes:
    """Return one line of JSON with its newline; JSON escapes the newlines inside texts."""
    return event.model_dump_json().encode() + b"\n"


class EventReader(Iterator[Event]):
    """Iterates over the events of a log, skipping lines that are not events of this schema.

    Skipped are torn lines (the process or the disk stopped in the middle), lines of another schema version, with a
    number that is not finite, or longer than `MAX_LINE_BYTES`, and all others that do not validate. Blank lines are not
    counted. The files are read as a stream.

    Args:
        paths: the parts of the log, oldest first.

    Raises:
        OSError: during the iteration, when a part cannot be opened.
    """

    def __init__(self, *paths: Path) -> None:
        self.skipped_lines = 0
        """Skipped lines so far."""
        self._events = self._read(paths)

    def __next__(self) -> Event:
        return next(self._events)

    def _read(self, paths: tuple[Path, ...]) -> Iterator[Event]:
        for path in paths:
            with path.open("rb") as lines:
                while line := lines.readline(MAX_LINE_BYTES):
                    if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                        while not line.endswith(b"\n") and (line := lines.readline(MAX_LINE_BYTES)):
                            pass
                        self.skipped_lines += 1
                        continue
                    line = line.removeprefix(codecs.BOM_UTF8)  # of an editor, or of a file put behind another
                    if not line.strip():
                        continue
                    try:
                        yield EVENT.validate_json(line)
                    except ValidationError:
                        self.skipped_lines += 1


def read_event_log(path: str | Path, *, rotated: bool = False) -> EventReader:
    """Read an event log.

    Args:
        path: the file that `EventLogExporter` wrote.
        rotated: first read the older part, `<name>.1`, if there is one. It ends where this file begins. A run that was
            killed during a rotation may have left only the older part.

    Returns:
        An iterator of events; its `skipped_lines` counts the lines that are not events.

    Raises:
        ConfigError: `path` does not name a file, or `rotated` is not a flag.
        OSError: with the first event, when the file cannot be opened.

    Examples:
        >>> import tempfile
        >>> from ess_monitor.records import RunInfo
        >>> started = RunStartedEvent(
        ...     timestamp_seconds=0.0, run="demo", data=RunInfo(run_name="demo", model="Net", layers=())
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "events.jsonl")
        ...     _ = path.write_bytes(encode_event(started) + b'{"event": "meas')
        ...     events = read_event_log(path)
        ...     [(event.event, event.run) for event in events], events.skipped_lines
        ([('run_started', 'demo')], 1)
    """
    validation.instance("path", path, (str, Path), hint="the file of an event log")
    validation.flag("rotated", rotated)
    path = Path(path)
    if not path.name:
        raise ConfigError(f"path={validation.shown(str(path))} does not name a file; give the event log itself.")
    older = rotated_path(path)
    if not rotated or not older.exists():
        return EventReader(path)
    return EventReader(older, path) if path.exists() else EventReader(older)
