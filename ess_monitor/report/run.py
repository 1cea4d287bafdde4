"""Opens a run of an event log in Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from ess_monitor import validation
from ess_monitor.errors import ConfigError
from ess_monitor.records import Action, Condition, Finding, Reading, RunInfo, RunStatus, condition_title, layer_title
from ess_monitor.records.dataframe import RecordList
from ess_monitor.report.components import event_rows, marks, metrics_figure, steps_of
from ess_monitor.report.figures import Figure
from ess_monitor.report.history import RunHistory, load_history
from ess_monitor.report.sections.layers import positions_figure, sizes_figure, tolerances_figure
from ess_monitor.report.sections.modulation import modulation_figure
from ess_monitor.report.sections.run_facts import overhead_figure
from ess_monitor.report.sections.spectra import chosen_spectra, spectra_figure
from ess_monitor.report.sections.utilization import ratio_figure
from ess_monitor.report.summary import by_attention

_OF_THE_RUN: dict[str, Callable[[RunHistory], Figure | None]] = {
    "utilization": lambda run: ratio_figure(run, "utilization_ratio", "Utilization of every layer, ESS / TSS"),
    "retention": lambda run: ratio_figure(run, "retention_ratio", "Retention of every layer"),
    "metrics": lambda run: metrics_figure({"": run}, steps_of(run), event_rows(run)),
    "modulation": lambda run: modulation_figure(run, marks(event_rows(run))),
    "overhead": overhead_figure,
}
_OF_A_LAYER: dict[str, Callable[[RunHistory, str], Figure | None]] = {
    "sizes": lambda run, layer: sizes_figure(run, layer, marks(event_rows(run), layer)),
    "positions": positions_figure,
    "tolerances": tolerances_figure,
    "spectra": lambda run, layer: spectra_figure(chosen_spectra(run, layer)),
}
FIGURES = (*_OF_THE_RUN, *_OF_A_LAYER)
"""Names that `Run.figure` takes."""


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

    def figure(self, name: str, layer: str | None = None) -> Any:
        """Return a figure of the report as a `plotly.graph_objects.Figure`, to show, change or save.

        Args:
            name: of the run: utilization or retention (heat maps of all layers over the steps), metrics (those of the
                training, with findings and actions), overhead (what the monitor cost). Of one layer: sizes (ESS with
                its bounds, entropy-ESS and TSS over the steps), positions (ESS over the positions of the sequence),
                spectra (singular values at a few steps).
            layer: whose sizes, positions or spectra. By default the layer that needs attention most.

        Raises:
            ConfigError: no such figure or layer, the log has no data for it, or plotly is not installed.
        """
        name = _one_of("name", name, FIGURES)
        if name in _OF_THE_RUN:
            if layer is not None:
                raise ConfigError(f"layer: {name} shows all layers; leave it out, or give a name of {[*_OF_A_LAYER]}")
            figure, of = _OF_THE_RUN[name](self.history), ""
        else:
            layers = by_attention(self.history)
            layer = _one_of("layer", layer, layers) if layer is not None or not layers else layers[0]
            figure, of = _OF_A_LAYER[name](self.history, layer), f" of {validation.shown(layer)}"
        if figure is None:
            raise ConfigError(f"name: the log of {self.name} has no data for {name}{of}; print(run) tells what it has")
        return (
            replace(figure, title=f"{layer_title(layer)}: {figure.title}") if layer is not None else figure
        ).to_plotly()

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


def _one_of(argument: str, value: Any, names: Sequence[str]) -> str:
    if value in names:
        return str(value)
    meant = get_close_matches(str(value), names, n=1)
    hint = f"did you mean {validation.shown(meant[0])}? " if meant else ""
    raise ConfigError(f"{argument}: no {validation.shown(value)}; {hint}give one of {', '.join(names) or 'none'}")


def load_run(path: str | Path, run: str | int | None = None) -> Run:
    """Open a run of an event log, by default the last.

    Args:
        path: the log, or a folder: the log in it that was written last.
        run: which run of the log: its name, of several with one name the last, or its number, counted from 1.

    Raises:
        ConfigError: there is no log, or it holds no run, or not this one; the message lists those it holds.

    Examples:
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
