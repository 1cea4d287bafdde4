"""From the lines of an event log to what happened in one run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

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
from ess_monitor.records import Action, Condition, Finding, LayerInfo, Measurement, Reading, RunInfo, Snapshot

MEASUREMENTS_KEPT = 2000
"""Above this every other measurement is let go, so that the log of a very long run fits into memory. More than a chart
can show; findings and actions are all kept."""

_PART_SUFFIXES = ("*.jsonl", "*.jsonl.1")


@dataclass(frozen=True)
class RunHistory:
    """One run, as its event log tells it. Steps of `measurements`, `findings` and `actions` never go back."""

    path: Path
    """The event log."""
    info: RunInfo
    """What the run said of itself, when it was last started."""
    measurements: tuple[Measurement, ...] = ()
    findings: tuple[Finding, ...] = ()
    actions: tuple[Action, ...] = ()
    final: Snapshot | None = None
    """The last counters; None where the log has no end (killed, or still going on)."""
    start_seconds: float = 0.0
    """When the run was first started, seconds since the epoch."""
    end_seconds: float = 0.0
    """Time of the last line."""
    resumed_at: tuple[int, ...] = ()
    """First measured step after each resumption."""
    earlier_runs: int = 0
    """Runs that the file holds before this one."""
    thinned: int = 1
    """Every how many-th measurement was kept."""
    skipped_lines: int = 0
    """Lines that were no event of this schema: torn by a kill, or of another version."""

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Names in model order, then those that were measured unannounced."""
        announced = [layer.name for layer in self.info.layers]
        measured = [reading.layer for measurement in self.measurements for reading in measurement.readings]
        return tuple(dict.fromkeys([*announced, *measured]))

    @cached_property
    def readings(self) -> dict[str, tuple[Reading, ...]]:
        """Every reading of each layer, whatever its status, in order."""
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
    def warmup_steps(self) -> int:
        """Step from which readings were judged; 0 where the log does not tell."""
        return int(self.info.diagnosis.get("warmup_steps") or 0)

    @property
    def spared_layer(self) -> str | None:
        """The layer that is never called collapsed: the first of several that are judged, unless it was asked for."""
        told = [layer for layer in self.layers if not self.layer(layer).uninformative]
        return told[0] if len(told) > 1 and self.info.diagnosis.get("spare_first_layer") else None

    def layer(self, name: str) -> LayerInfo:
        """What was known of a layer at the start; a bare entry for one that was measured unannounced."""
        known = {layer.name: layer for layer in self.info.layers}
        return known.get(name) or LayerInfo(name=name, module="", supported=True)

    def ok(self, layer: str) -> tuple[Reading, ...]:
        """The readings of a layer that carry sizes."""
        return tuple(reading for reading in self.readings.get(layer, ()) if reading.status == "ok")

    def series(self, layer: str, quantity: str) -> list[tuple[int, float]]:
        """(step, value) of one field of `Reading`, where it is known."""
        pairs = ((reading.step, getattr(reading, quantity)) for reading in self.ok(layer))
        return [(step, float(value)) for step, value in pairs if value is not None]

    def metric(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric of the training loop, as it was at the measured steps."""
        return [(each.step, each.metrics[name]) for each in self.measurements if name in each.metrics]

    def at(self, layer: str, step: int) -> Reading | None:
        """The newest reading with sizes at or before `step`."""
        before = [reading for reading in self.ok(layer) if reading.step <= step]
        return before[-1] if before else None


def find_event_log(path: str | Path) -> Path:
    """The event log in a run's folder, or `path` itself where it is a file.

    Raises:
        ConfigError: there is none, or there are several and it is not clear which is meant.
    """
    validation.instance("RUN_DIR", path, (str, Path), hint="the folder of a run, or its event log")
    path = Path(path)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        is_file = is_folder = False
    if is_file:
        return path
    if not is_folder:
        raise ConfigError(
            f"RUN_DIR: {validation.shown(str(path))} does not exist; give the folder of a run, or its event log"
        )
    files = sorted(file for pattern in _PART_SUFFIXES for file in path.rglob(pattern))
    logs = sorted({file.with_name(file.name.removesuffix(".1")) for file in files if _holds_events(file)})
    if not logs:
        raise ConfigError(
            f"RUN_DIR: no event log lies in {path}; train with the exporter `event_log` "
            '(exporters=["event_log"]) and give the folder it writes to'
        )
    if len(logs) > 1:
        names = ", ".join(str(log) for log in logs[:8]) + (", ..." if len(logs) > 8 else "")
        raise ConfigError(f"RUN_DIR: {path} holds {len(logs)} event logs; give one of them: {names}")
    return logs[0]


def load_history(path: str | Path) -> RunHistory:
    """The last run that an event log holds.

    A resumed run is one run: where it went back to a checkpoint, what came after that checkpoint the first time is
    dropped. A run of another model, or one that began from the start again, is a new run.

    Args:
        path: the log, or a folder that holds exactly one.

    Raises:
        ConfigError: there is no log, or it has no run in it.
    """
    log = find_event_log(path)
    try:
        reader = read_event_log(log, rotated=True)
        story = _tell(log, reader)
    except OSError as error:
        raise ConfigError(
            f"RUN_DIR: {log} cannot be read ({error.strerror}); give a file this user may read"
        ) from error
    if story is None:
        raise ConfigError(
            f"RUN_DIR: {log} holds no run: {reader.skipped_lines} lines were no events of this schema version; "
            "give the file that the exporter `event_log` wrote"
        )
    return replace(story, skipped_lines=reader.skipped_lines)


def _holds_events(path: Path) -> bool:
    return next(read_event_log(path), None) is not None


@dataclass
class _Run:
    """A run while its lines come in."""

    info: RunInfo
    start_seconds: float
    measurements: list[Measurement] = field(default_factory=list)
    findings: dict[Finding, None] = field(default_factory=dict)
    actions: dict[Action, None] = field(default_factory=dict)
    final: Snapshot | None = None
    end_seconds: float = 0.0
    resumed_at: list[int] = field(default_factory=list)
    thinned: int = 1
    _seen: int = 0

    def add(self, measurement: Measurement) -> None:
        self.findings.update(dict.fromkeys(measurement.findings))
        self.actions.update(dict.fromkeys(measurement.actions))
        self._seen += 1
        if (self._seen - 1) % self.thinned == 0:
            self.measurements.append(measurement)
        if len(self.measurements) > MEASUREMENTS_KEPT:
            self.measurements = self.measurements[::2]
            self.thinned *= 2

    def go_back_to(self, step: int) -> None:
        self.resumed_at = [*(each for each in self.resumed_at if each < step), step]
        self.measurements = [each for each in self.measurements if each.step < step]
        self.findings = {each: None for each in self.findings if each.step < step}
        self.actions = {each: None for each in self.actions if each.step < step}
        self.final = None

    def continues_with(self, info: RunInfo) -> bool:
        layers, others = ([layer.name for layer in each.layers] for each in (self.info, info))
        return self.info.model == info.model and layers == others


def _tell(path: Path, events: Iterable[Event]) -> RunHistory | None:
    run: _Run | None = None
    started: RunInfo | None = None  # a start that no measurement has followed yet
    earlier = 0
    for event in events:
        match event:
            case RunStartedEvent(data=info):
                if run is None or (info != run.info and not run.continues_with(info)):
                    earlier += run is not None
                    run, started = _Run(info, info.start_timestamp_seconds or event.timestamp_seconds), None
                elif info != run.info:  # a rotated file repeats its own start
                    run.final, started = None, info
            case MeasurementEvent(data=measurement) if run is not None:
                if started is not None:
                    if run.measurements and measurement.step <= run.measurements[0].step:
                        earlier += 1
                        run = _Run(started, started.start_timestamp_seconds or event.timestamp_seconds)
                    else:
                        run.go_back_to(measurement.step)
                        run.info = started
                    started = None
                run.add(measurement)
            case FindingEvent(data=finding) if run is not None:
                run.findings.setdefault(finding)
            case ActionEvent(data=action) if run is not None:
                run.actions.setdefault(action)
            case RunFinishedEvent(data=final) if run is not None:
                run.final = final
        if run is not None:
            run.end_seconds = event.timestamp_seconds
    if run is None:
        return None
    return RunHistory(
        path=path,
        info=run.info,
        measurements=tuple(sorted(run.measurements, key=lambda each: each.step)),
        findings=tuple(sorted(run.findings, key=lambda each: each.step)),
        actions=tuple(sorted(run.actions, key=lambda each: each.step)),
        final=run.final,
        start_seconds=run.start_seconds,
        end_seconds=run.end_seconds,
        resumed_at=tuple(run.resumed_at),
        earlier_runs=earlier,
        thinned=run.thinned,
    )
