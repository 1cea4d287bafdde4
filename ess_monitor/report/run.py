"""Opens a run of an event log in Python."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ess_monitor.records import Action, Condition, Finding, Reading, RunInfo, RunStatus, condition_title
from ess_monitor.records.dataframe import RecordList
from ess_monitor.report.history import RunHistory, load_history


@dataclass(frozen=True, repr=False)
class Run:
    """One run of an event log, for notebooks and scripts. `print` tells what it is."""

    history: RunHistory
    """Everything that was read, as the report uses it."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.history.info.run_name

    @property
    def info(self) -> RunInfo:
        """What the run recorded when it was last started: model, layers, versions, settings of the diagnosis."""
        return self.history.info

    @property
    def status(self) -> RunStatus | None:
        """How it ended; None where the log has no end: it still goes on, or was killed."""
        return None if self.history.final is None else self.history.final.status

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in model order."""
        return self.history.layers

    @property
    def conditions(self) -> dict[str, Condition]:
        """Condition of every layer at the end."""
        return self.history.conditions

    @cached_property
    def readings(self) -> RecordList[Reading]:
        """Every reading, whatever its status, by step and then in the order of the layers. Of very long runs only every
        `history.thinned`-th measurement was kept."""
        measurements = self.history.measurements
        return RecordList(Reading, (reading for each in measurements for reading in each.readings))

    @cached_property
    def findings(self) -> RecordList[Finding]:
        """Changes of condition, by step."""
        return RecordList(Finding, self.history.findings)

    @cached_property
    def actions(self) -> RecordList[Action]:
        """What the autopilot did or said, by step."""
        return RecordList(Action, self.history.actions)

    @property
    def _ending(self) -> str:
        return self.status or "no end recorded"

    def __repr__(self) -> str:
        return f"<Run {self.name!r} of {self.info.model}: {self._ending}, {len(self.readings)} readings>"

    def __str__(self) -> str:
        first, last = self.history.steps
        counted = Counter(condition_title(condition) for condition in self.conditions.values())
        lines = [
            f"{self.name}: {self.info.model}, {self._ending}",
            f"{len(self.layers)} layers, {len(self.readings)} readings from step {first} to {last}",
            f"findings: {len(self.findings)}, actions: {len(self.actions)}",
            f"layers at the end: {', '.join(f'{count} {title}' for title, count in counted.items()) or 'none'}",
        ]
        return "\n".join(lines)


def load_run(path: str | Path, run: str | int | None = None) -> Run:
    """Open a run of an event log, by default the last.

    Args:
        path: the log, or a folder: the log in it that was written last.
        run: which run of the log: its name, of several with one name the last, or its number, counted from 1.

    Raises:
        ConfigError: there is no log, or it holds no run, or not this one; the message lists those it holds.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ess_monitor.exporters.event_log.events import RunStartedEvent, encode_event
        >>> start = RunStartedEvent(
        ...     timestamp_seconds=0.0, run="demo", data=RunInfo(run_name="demo", model="GLA", layers=())
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "events.jsonl").write_bytes(encode_event(start))
        ...     demo = load_run(folder)
        >>> demo, demo.readings
        (<Run 'demo' of GLA: no end recorded, 0 readings>, <0 records: Reading>)
    """
    return Run(load_history(path, run))
