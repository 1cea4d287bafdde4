"""Writes curves of every layer, a page of charts, heat maps, findings and actions to TensorBoard."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ess_monitor import validation
from ess_monitor.errors import ConfigError, ExporterError, format_error
from ess_monitor.exporters.scalars import LOSS_RATIO_TAG, layer_tag, loss_name, scalars
from ess_monitor.exporters.tensorboard.layout import Spikes, add_layout, custom_scalars_layout, spike_tag
from ess_monitor.exporters.tensorboard.markdown import action_table, escape, finding_markdown
from ess_monitor.records import Action, Measurement, RunInfo, RunStatus, Snapshot, layer_title
from ess_monitor.validation.settings import Settings

if TYPE_CHECKING:
    from ess_monitor.exporters.tensorboard.heatmaps import Heatmap

ACTIONS_TAG = "ess_actions/table"
"""Text tag of the table of actions."""
PICTURES_TAG = "ess_help/pictures"
"""Text tag of the legend of the heat maps."""
OVERVIEW_TAG = "ess/utilization_of_every_layer--see_CUSTOM_SCALARS"
"""Image tag of the heat map of all layers. TensorBoard opens with the tags that come first, and shows no other hint."""

_TABLE_ROWS = 100
"""Newest actions that the table holds: many times what a run's budget allows."""
_OUR_EVENTS = ".ess_monitor"
"""End of the names of the files that a writer of our own writes."""
_INSTALL = 'pip install "ess-monitor[tensorboard]"'


class TensorBoardConfig(Settings):
    """Settings of the TensorBoard exporter."""

    kind: Literal["tensorboard"] = "tensorboard"
    """Which exporter this is."""
    log_dir: Path = Path("runs")
    """Folder for `tensorboard --logdir`. Each run writes into a sub-folder of its name: two runs in one folder would be
    drawn as one zigzag. Not used with an injected writer. `runs` is the default of PyTorch's writer."""
    scalars: bool = True
    """False: no curves, if something else logs them to the same writer (a framework's own loggers)."""
    layout: bool = True
    """Adds the custom-scalars page. False keeps a page of your own: a run has only one."""
    heatmap_columns: int = Field(default=128, ge=0, le=1024)
    """Newest measurements that a heat map shows; 0 draws no heat maps. 128 squares fit a screen."""
    heatmap_rows: int = Field(default=64, ge=1, le=1024)
    """Most heads or positions that a heat map shows: a screen cannot show more rows distinctly."""


class TensorBoardExporter:
    """Writes measurements into a `SummaryWriter`.

    Global step is `measurement.step`. Each measurement draws one heat map, because a picture costs a hundred times what
    a scalar does: that of all layers and one of a layer (heads, positions or spectrum) by turns. Closing draws those
    that have changed since.
    The table of actions is written again with each action; its newest version holds the earlier actions too.

    Args:
        config: what is written.
        writer: an open `torch.utils.tensorboard.SummaryWriter`, such as a framework logger's own. It is flushed but
            never closed here, and it is called on the training thread, as framework loggers are not thread-safe.
            None: `start` opens a writer.
    """

    name = "tensorboard"

    def __init__(self, config: TensorBoardConfig | None = None, writer: Any = None) -> None:
        self.inline = writer is not None
        self.config = validation.optional("config", config, TensorBoardConfig) or TensorBoardConfig()
        if writer is not None and (isinstance(writer, type) or not hasattr(writer, "add_scalar")):
            raise ConfigError(
                f"writer: {validation.type_of(writer)} is not a SummaryWriter; None opens one below log_dir"
            )
        self._injected = writer
        self._writer: Any = None
        self._places: dict[str, int] = {}
        self._pictures: dict[str, Heatmap] = {}
        self._turn = self._next_picture = 0
        self._loss: str | None = None
        self._highest_loss = 0.0
        self._actions: deque[Action] = deque(maxlen=_TABLE_ROWS)
        self._spikes: dict[str, Spikes] = {}
        self._last: Measurement | None = None

    @property
    def shown_by(self) -> str | None:
        """Where the curves are, and the command that shows them."""
        folder = str(getattr(self._injected, "log_dir", "")) if self._injected is not None else str(self.config.log_dir)
        if not folder:
            return None
        page = " (charts of every layer: page CUSTOM SCALARS)" if self.config.layout else ""
        return f"curves: {folder}; see them with: tensorboard --logdir {shlex.quote(folder)}{page}"

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """Open the writer and write the layout of the page.

        A folder that has events of earlier runs of ours, and no others, is purged from the run's first step on: else
        their curves and the ones of this run would be drawn as one zigzag. An injected writer is not: TensorBoard would
        drop all curves of its folder from that step on, whatever their steps count.

        Raises:
            ExporterError: tensorboard is not installed, or the folder cannot be written.
        """
        if self.config.heatmap_columns and importlib.util.find_spec("PIL") is None:
            raise ExporterError(
                f"tensorboard.heatmap_columns={self.config.heatmap_columns} needs Pillow, which is not installed. "
                f"Install it ({_INSTALL} pillow), or set heatmap_columns=0."
            )
        self._writer = self._injected if self._injected is not None else self._open_writer(run)
        if self.config.layout:
            names, modulation = (layer.name for layer in run.layers), bool(run.modulation_separators)
            add_layout(self._writer, custom_scalars_layout(names, modulation=modulation))
        if self.config.heatmap_columns:
            from ess_monitor.exporters.tensorboard.heatmaps import LEAST_HEIGHT_PIXELS, LEGEND, Heatmap

            measured = [layer.name for layer in run.layers if layer.supported]
            self._places = {name: place for place, name in enumerate(measured)}
            self._pictures[OVERVIEW_TAG] = Heatmap(self.config.heatmap_columns, len(measured), LEAST_HEIGHT_PIXELS)
            legend = LEGEND.format(layers=", ".join(escape(layer_title(name)) for name in measured))
            self._writer.add_text(PICTURES_TAG, legend, global_step=0)

    def export(self, measurement: Measurement) -> None:
        """Write one measurement."""
        if self._writer is None:
            return
        self._last = measurement
        step, when = measurement.step, measurement.timestamp_seconds
        if self.config.scalars:
            for tag, value in {**scalars(measurement), **self._metrics(measurement)}.items():
                self._writer.add_scalar(tag, value, global_step=step, walltime=when)
        for finding in measurement.findings:
            self._writer.add_text(
                f"ess_findings/{layer_tag(finding.layer)}", finding_markdown(finding), global_step=step, walltime=when
            )
        self._write_actions(measurement)
        self._add_columns(measurement)
        self._draw_next(measurement)

    def close(self, status: RunStatus) -> None:
        """Draw what has changed, flush, and close the writer unless it was injected."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            if self._last is not None:
                for tag in self._pictures:
                    self._draw(writer, tag, self._last)
            writer.flush()
        finally:
            if self._injected is None:
                writer.close()

    def _open_writer(self, run: RunInfo) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ExporterError(
                f"the TensorBoard exporter needs the package tensorboard ({error}). Install it with {_INSTALL}, "
                "or leave `tensorboard` out of `exporters`."
            ) from error
        folder = self.config.log_dir / (re.sub(r"[^\w.\-]", "_", run.run_name).strip(".") or "run")
        try:
            events = [path.name for path in folder.glob("*tfevents*")]
            ours_alone = bool(events) and all(name.endswith(_OUR_EVENTS) for name in events)
            purge_step = run.first_step if ours_alone else None
            return SummaryWriter(log_dir=str(folder), purge_step=purge_step, filename_suffix=_OUR_EVENTS)
        except OSError as error:
            raise ExporterError(
                f"tensorboard.log_dir={str(self.config.log_dir)!r}: {str(folder)!r} cannot be written "
                f"({format_error(error)}). Give a folder this process may write to."
            ) from error

    def _metrics(self, measurement: Measurement) -> dict[str, float]:
        """Return the metrics of the loop, which framework loggers get from the loop itself, and the loss ratio."""
        values = {f"ess_metrics/{layer_tag(name)}": value for name, value in measurement.metrics.items()}
        self._loss = self._loss or loss_name(measurement.metrics)
        loss = measurement.metrics.get(self._loss or "", 0.0)
        self._highest_loss = max(self._highest_loss, loss)
        if loss > 0:  # a share of a value that may be negative means nothing
            values[LOSS_RATIO_TAG] = loss / self._highest_loss
        return values

    def _write_actions(self, measurement: Measurement) -> None:
        if not measurement.actions:
            return
        self._actions.extend(measurement.actions)
        when = measurement.timestamp_seconds
        self._writer.add_text(ACTIONS_TAG, action_table(self._actions), global_step=measurement.step, walltime=when)
        for action in measurement.actions:
            if action.outcome == "applied":
                for step, height in self._spikes.setdefault(action.layer, Spikes()).at(action.step):
                    self._writer.add_scalar(spike_tag(action.layer), height, global_step=step, walltime=when)

    def _add_columns(self, measurement: Measurement) -> None:
        if not self.config.heatmap_columns:
            return
        from ess_monitor.exporters.tensorboard.heatmaps import PICTURES, Heatmap, layers

        measured = [reading for reading in measurement.readings if reading.status == "ok"]
        self._pictures[OVERVIEW_TAG].add(layers(measured, self._places))
        for reading in measured:
            for section, read in PICTURES.items():
                tag = f"{section}/{layer_tag(reading.layer)}"
                if tag not in self._pictures:
                    self._pictures[tag] = Heatmap(self.config.heatmap_columns, self.config.heatmap_rows)
                self._pictures[tag].add(read(reading))

    def _draw_next(self, measurement: Measurement) -> None:
        self._turn += 1
        if self._turn % 2 and self._draw(self._writer, OVERVIEW_TAG, measurement):
            return
        tags = [tag for tag in self._pictures if tag != OVERVIEW_TAG]
        for _ in tags:  # a heat map without a new column loses its turn
            tag = tags[self._next_picture % len(tags)]
            self._next_picture += 1
            if self._draw(self._writer, tag, measurement):
                return

    def _draw(self, writer: Any, tag: str, measurement: Measurement) -> bool:
        heatmap = self._pictures.get(tag)
        if heatmap is None or not heatmap.changed:
            return False
        writer.add_image(tag, heatmap.image(), global_step=measurement.step, walltime=measurement.timestamp_seconds)
        return True
