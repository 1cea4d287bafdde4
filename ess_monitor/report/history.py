"""Read an event log into the history of one run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Generic, TypeVar

from ess_monitor import validation
from ess_monitor.errors import ConfigError
from ess_monitor.exporters import Event, read_event_log
from ess_monitor.exporters.event_log.events import (
    ActionEvent,
    FindingEvent,
    MeasurementEvent,
    RunFinishedEvent,
    RunStartedEvent,
)
from ess_monitor.exporters.event_log.rotating_file import rotated_path
from ess_monitor.records import Action, Condition, Finding, LayerInfo, Measurement, Reading, RunInfo, Snapshot

MEASUREMENTS_KEPT = 2000
"""Above this number every other measurement is dropped, so that the log of a very long run fits into memory. It is more
than a chart can show."""
EVENTS_KEPT = 1000
"""Of the findings, and of the actions, so many of the first and so many of the newest are kept; the others are counted.
A page lists 300."""

READINGS_KEPT = 100_000
"""The same for readings, of all layers together; of 50 layers and fewer the number of measurements decides."""

_COUNTER = re.compile(r"(^|[/_. ])(epoch|(global_)?step|learning_rate|lr(-.*)?|num_input_tokens_seen)$", re.IGNORECASE)
"""Names under which trainers log how far they are, and the learning rate (of an optimizer: lr-AdamW)."""
_RUNS_NAMED = 8
_LOG_PATTERNS = ("*.jsonl", "*.jsonl.1")


@dataclass(frozen=True)
class RunHistory:
    """One run, read from its event log. `measurements`, `findings` and `actions` are sorted by step."""

    path: Path
    """The event log."""
    info: RunInfo
    """What the run recorded when it was last started."""
    measurements: tuple[Measurement, ...] = ()
    findings: tuple[Finding, ...] = ()
    actions: tuple[Action, ...] = ()
    warnings: tuple[str, ...] = ()
    """What the run warned of, in order."""
    final: Snapshot | None = None
    """The last counters; None where the log has no end (the run was killed, or it is still going on)."""
    start_seconds: float = 0.0
    """Time of the first start, since the epoch."""
    end_seconds: float = 0.0
    """Time of the last event, since the epoch."""
    resumed_at: tuple[int, ...] = ()
    """First measured step after each resumption."""
    earlier_runs: int = 0
    """Number of runs before this one in the same log."""
    thinned: int = 1
    """k where only every k-th measurement was kept. The measurements have neither findings nor actions of their own."""
    events_dropped: int = 0
    """Number of findings and actions that were not kept."""
    skipped_lines: int = 0
    """Number of lines that are not events of this schema: cut off by a kill, or of another version."""

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Layer names in model order, then those that were measured but not listed at the start."""
        listed = [layer.name for layer in self.info.layers]
        measured = [reading.layer for measurement in self.measurements for reading in measurement.readings]
        return tuple(dict.fromkeys([*listed, *measured]))

    @cached_property
    def readings(self) -> dict[str, tuple[Reading, ...]]:
        """All readings of each layer, whatever their status, in order."""
        found: dict[str, list[Reading]] = {layer: [] for layer in self.layers}
        for measurement in self.measurements:
            for reading in measurement.readings:
                found[reading.layer].append(reading)
        return {layer: tuple(readings) for layer, readings in found.items()}

    @cached_property
    def conditions(self) -> dict[str, Condition]:
        """Condition of every layer at the end."""
        last: dict[str, Condition] = dict.fromkeys(self.layers, "unknown")
        for measurement in self.measurements:
            last.update({layer: value for layer, value in measurement.conditions.items() if layer in last})
        return last

    @property
    def steps(self) -> tuple[int, int]:
        """First and last measured step; (0, 0) where nothing was measured."""
        return (self.measurements[0].step, self.measurements[-1].step) if self.measurements else (0, 0)

    @cached_property
    def metric_names(self) -> tuple[str, ...]:
        """Metrics of the training loop, the loss first."""
        names = list(dict.fromkeys(name for measurement in self.measurements for name in measurement.metrics))
        return tuple(sorted(names, key=lambda name: (name != "loss", "loss" not in name.lower())))

    @property
    def curve_names(self) -> tuple[str, ...]:
        """Metrics worth a curve: without those that only count or follow a schedule (epoch, learning rate)."""
        return tuple(name for name in self.metric_names if not _COUNTER.search(name))

    @property
    def warmup_steps(self) -> int:
        """First step at which readings were judged; 0 where the log does not say."""
        return int(self.info.diagnosis.get("warmup_steps") or 0)

    @property
    def spared_layer(self) -> str | None:
        """The layer that is never called collapsed: with `spare_first_layer`, the first of several judged ones."""
        judged = [layer for layer in self.layers if not self.layer(layer).uninformative]
        return judged[0] if len(judged) > 1 and self.info.diagnosis.get("spare_first_layer") else None

    def layer(self, name: str) -> LayerInfo:
        """Return what was known of a layer at the start; a bare entry for one that was not listed then."""
        known = {layer.name: layer for layer in self.info.layers}
        return known.get(name) or LayerInfo(name=name, module="", supported=True)

    def ok(self, layer: str) -> tuple[Reading, ...]:
        """Return the readings of a layer that have sizes."""
        return tuple(reading for reading in self.readings.get(layer, ()) if reading.status == "ok")

    def series(self, layer: str, quantity: str) -> list[tuple[int, float]]:
        """Return (step, value) of one field of `Reading`, where it is known."""
        pairs = ((reading.step, getattr(reading, quantity)) for reading in self.ok(layer))
        return [(step, float(value)) for step, value in pairs if value is not None]

    def metric(self, name: str) -> list[tuple[int, float]]:
        """Return (step, value) of one metric of the training loop at the measured steps."""
        return [(each.step, each.metrics[name]) for each in self.measurements if name in each.metrics]

    def at(self, layer: str, step: int) -> Reading | None:
        """Return the newest reading with sizes at or before `step`."""
        return next((reading for reading in reversed(self.ok(layer)) if reading.step <= step), None)


def find_event_log(path: str | Path) -> Path:
    """Return the event log in a run's folder, or `path` itself where it is a file.

    Of several in the folder and below it, it is the one that was written last.

    Raises:
        ConfigError: the folder holds no event log.
    """
    return max(find_event_logs(path), key=_written_seconds)


def find_event_logs(path: str | Path) -> list[Path]:
    """Return every event log in a folder and below it, by name, or `path` itself where it is a file.

    Raises:
        ConfigError: the folder holds no event log.
    """
    validation.instance("RUN_DIR", path, (str, Path), hint="the folder of a run, or its event log")
    path = Path(path)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError):  # not a valid file name
        is_file = is_folder = False
    if is_file:
        return [path]
    if not is_folder:
        found = "is not a file" if os.path.exists(path) else "does not exist"
        raise ConfigError(f"RUN_DIR: {validation.shown(str(path))} {found}; give the folder of a run, or its event log")
    files = [file for pattern in _LOG_PATTERNS for file in path.rglob(pattern) if _has_events(file)]
    by_target = {(log := file.with_name(file.name.removesuffix(".1"))).resolve(): log for file in files}
    logs = sorted(by_target.values())
    if not logs:
        raise ConfigError(
            f"RUN_DIR: {path} holds no event log; train with the exporter `event_log` "
            '(exporters=["event_log"]) and give the folder it writes to'
        )
    return logs


def _has_events(file: Path) -> bool:
    try:
        return file.is_file() and next(read_event_log(file), None) is not None
    except OSError:
        return False  # not readable for this user


def _written_seconds(log: Path) -> float:
    """Return when a log was written last; of one that was only rotated, its older part."""
    return max(part.stat().st_mtime for part in (log, rotated_path(log)) if part.is_file())


def load_history(path: str | Path, run: str | int | None = None) -> RunHistory:
    """Read one run in an event log, by default the last.

    A resumed run is one run: measurements after the checkpoint that it was resumed from are dropped. A run of another
    model, or one that started again from its first step, is a new run.

    Args:
        path: the log, or a folder: the log in it that was written last.
        run: which run of the log: its name, of several with one name the last, or its number, counted from 1.

    Raises:
        ConfigError: there is no log, or it holds no run, or not this one.
    """
    log = find_event_log(path)
    if not (run is None or isinstance(run, str)):
        run = validation.whole("run", run, 1, hint="the number of a run, or its name")
    name = None if run is None else str(run)
    names: list[str] = []
    found: _RunBuilder | None = None
    try:
        reader = read_event_log(log, rotated=True)
        for each in _runs(reader):
            names.append(each.info.run_name)
            by_number = name == str(len(names)) and (found is None or found.info.run_name != name)
            if name is None or each.info.run_name == name or by_number:
                found = each
    except OSError as error:
        raise ConfigError(
            f"RUN_DIR: {log} cannot be read ({error.strerror}); give a file this user may read"
        ) from error
    if not names:
        raise ConfigError(
            f"RUN_DIR: {log} holds no run: {reader.skipped_lines} lines are not events of this schema version; "
            "give the file that the exporter `event_log` wrote"
        )
    if found is None:
        listed = ", ".join(f"{number} {each}" for number, each in list(enumerate(names, 1))[-_RUNS_NAMED:])
        raise ConfigError(
            f"run: {log} holds no {validation.shown(run)}; give number or name of one of its {len(names)} runs: "
            f"{'..., ' if len(names) > _RUNS_NAMED else ''}{listed}"
        )
    return found.history(log, reader.skipped_lines)


def load_histories(log: Path) -> list[RunHistory]:
    """Read every run of one event log, in their order; none of a file that cannot be read or holds none."""
    try:
        reader = read_event_log(log, rotated=True)
        return [run.history(log, reader.skipped_lines) for run in list(_runs(reader))]
    except OSError:
        return []


EventT = TypeVar("EventT", Finding, Action)


@dataclass
class _Events(Generic[EventT]):
    """Keeps the first and the newest events of one kind, each once although a log holds it twice."""

    first: dict[EventT, None] = field(default_factory=dict)
    newest: dict[EventT, None] = field(default_factory=dict)
    dropped: int = 0

    def add(self, event: EventT) -> None:
        if event in self.first or event in self.newest:
            return
        (self.first if len(self.first) < EVENTS_KEPT else self.newest)[event] = None
        if len(self.newest) > EVENTS_KEPT:
            del self.newest[next(iter(self.newest))]
            self.dropped += 1

    def keep_before(self, step: int) -> None:
        self.first = {event: None for event in self.first if event.step < step}
        self.newest = {event: None for event in self.newest if event.step < step}

    def by_step(self) -> tuple[EventT, ...]:
        return tuple(sorted({**self.first, **self.newest}, key=attrgetter("step")))


@dataclass
class _RunBuilder:
    """Collects the events of one run."""

    info: RunInfo
    start_seconds: float
    earlier_runs: int
    measurements: list[Measurement] = field(default_factory=list)
    findings: _Events[Finding] = field(default_factory=_Events)
    actions: _Events[Action] = field(default_factory=_Events)
    warnings: dict[str, None] = field(default_factory=dict)
    final: Snapshot | None = None
    end_seconds: float = 0.0
    resumed_at: list[int] = field(default_factory=list)
    thinned: int = 1
    _seen: int = 0

    def continues_with(self, info: RunInfo) -> bool:
        layers, others = ([layer.name for layer in each.layers] for each in (self.info, info))
        return self.info.model == info.model and layers == others

    def resume(self, info: RunInfo, step: int) -> None:
        """Drop what was recorded from `step` on."""
        self.info = info
        self.final = None
        self.warnings = {}  # of other settings perhaps; what still holds is said again
        self.resumed_at = [*(each for each in self.resumed_at if each < step), step]
        self.measurements = [each for each in self.measurements if each.step < step]
        self.findings.keep_before(step)
        self.actions.keep_before(step)

    def add(self, measurement: Measurement) -> None:
        for finding in measurement.findings:
            self.findings.add(finding)
        for action in measurement.actions:
            self.actions.add(action)
        if len(self.warnings) < EVENTS_KEPT:
            self.warnings.update(dict.fromkeys(measurement.warnings))
        self._seen += 1
        if (self._seen - 1) % self.thinned == 0:
            self.measurements.append(measurement.model_copy(update={"findings": (), "actions": ()}))
        if len(self.measurements) > min(MEASUREMENTS_KEPT, READINGS_KEPT // max(len(measurement.readings), 1)):
            self.measurements = self.measurements[::2]
            self.thinned *= 2

    def history(self, path: Path, skipped_lines: int) -> RunHistory:
        return RunHistory(
            path=path,
            info=self.info,
            measurements=tuple(sorted(self.measurements, key=attrgetter("step"))),
            findings=self.findings.by_step(),
            actions=self.actions.by_step(),
            events_dropped=self.findings.dropped + self.actions.dropped,
            warnings=tuple(self.warnings),
            final=self.final,
            start_seconds=self.start_seconds,
            end_seconds=self.end_seconds,
            resumed_at=tuple(self.resumed_at),
            earlier_runs=self.earlier_runs,
            thinned=self.thinned,
            skipped_lines=skipped_lines,
        )


def _runs(events: Iterable[Event]) -> Iterator[_RunBuilder]:
    """Yield each run of a log when it is read to its end."""
    run: _RunBuilder | None = None
    restart: RunInfo | None = None  # a start that no measurement has followed yet

    def new_run(info: RunInfo, time_seconds: float) -> _RunBuilder:
        earlier_runs = 0 if run is None else run.earlier_runs + 1
        return _RunBuilder(info, info.start_timestamp_seconds or time_seconds, earlier_runs)

    for event in events:
        before = run
        match event:
            case RunStartedEvent(data=info):
                if run is None or not run.continues_with(info):
                    run, restart = new_run(info, event.timestamp_seconds), None
                elif info != run.info:  # a rotated file repeats its own start
                    run.final, restart = None, info
            case MeasurementEvent(data=measurement) if run is not None:
                if restart is not None:
                    if run.measurements and measurement.step <= run.measurements[0].step:
                        run = new_run(restart, event.timestamp_seconds)
                    else:
                        run.resume(restart, measurement.step)
                    restart = None
                run.add(measurement)
            case FindingEvent(data=finding) if run is not None:
                run.findings.add(finding)
            case ActionEvent(data=action) if run is not None:
                run.actions.add(action)
            case RunFinishedEvent(data=final) if run is not None:
                run.final = final
        if before is not None and before is not run:
            yield before
        if run is not None:
            run.end_seconds = event.timestamp_seconds
    if run is not None:
        yield run
