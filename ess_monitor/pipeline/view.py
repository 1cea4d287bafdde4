"""What is known of a run at this moment, for whoever holds its monitor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ess_monitor.errors import ConfigError
from ess_monitor.exporters import Exporter, ExporterHub
from ess_monitor.exporters.terminal.shown import Shown
from ess_monitor.exporters.terminal.table import plain_text, render_table
from ess_monitor.pipeline.context import RunContext
from ess_monitor.pipeline.replays import Replays
from ess_monitor.pipeline.results import ResultHandler
from ess_monitor.pipeline.trigger import SampleTrigger
from ess_monitor.records import Action, Condition, Finding, LayerInfo, Measurement, Reading, Snapshot
from ess_monitor.runtime.guard import logger
from ess_monitor.runtime.shutdown import close_abandoned

if TYPE_CHECKING:
    from rich.table import Table


class RunView(Shown):
    """Answers what is known of a run, and shows it. The base of `Monitor`, which sets these fields."""

    model: nn.Module
    _context: RunContext
    _trigger: SampleTrigger
    _results: ResultHandler
    _replays: Replays
    _hub: ExporterHub
    _step: int
    _running: bool | None
    """None before the start, False after the end."""
    _samples: bool
    _is_closing = False
    _terminated = False
    """True once SIGTERM has ended the run in the sinks."""
    _said_closed = False
    _in_block = False
    """Whether a with-block will close the monitor."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the measured layers, in model order."""
        return self._context.layer_names

    @property
    def readings(self) -> tuple[Reading, ...]:
        """Latest reading of every layer that has one, whatever its status."""
        latest = self._results.readings
        return tuple(latest[name] for name in self.layers if name in latest)

    @property
    def conditions(self) -> dict[str, Condition]:
        """Condition of every layer."""
        return self._results.conditions

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The last 1000 changes of condition, oldest first."""
        return self._results.findings

    @property
    def actions(self) -> tuple[Action, ...]:
        """The last 1000 things the autopilot did or said, oldest first."""
        return self._results.actions

    @property
    def overhead_ratio(self) -> float:
        """Measured cost of the monitor so far as a share of the training time."""
        return self._context.cadence.overhead_ratio

    @property
    def exporters(self) -> tuple[Exporter, ...]:
        """The sinks in use, from the configuration and from the argument."""
        return self._hub.exporters

    def snapshot(self) -> Snapshot:
        """Return all counters at this moment. Safe to call from any thread."""
        hub, context = self._hub, self._context
        return context.counters.snapshot(hub.errors, hub.dropped, hub.queue_lengths, context.health.data(hub.off))

    @property
    def sample_due(self) -> bool:
        """True when the cadence asks for a sample now; never on a rank whose readings nobody asks for."""
        return bool(self._running) and self._samples and self._context.cadence.due(self._step)

    @property
    def replay_due(self) -> bool:
        """True while batches are run again: `step` is then to be given a `replay`, if the loop has one."""
        return bool(self._running) and self._replays.due(self._step + 1)

    @property
    def armed(self) -> bool:
        """True while the next forward pass is to be sampled."""
        return self._trigger.armed_at is not None

    def _terminate(self) -> None:
        """End the run in the sinks, on a thread beside the training, which goes on as it would without this."""
        self._terminated = True
        self._context.counters.set_status("terminated")
        self._hub.close("terminated")

    @property
    def _alive(self) -> bool:
        """False before the start and after the end, and in a forked child."""
        return bool(self._running) and not self._context.health.forked

    def _close_abandoned(self) -> None:
        """Close monitors of the same layers that nobody has closed: their hooks would stay in the model."""
        mine = {id(layer.module) for layer in self._context.layers}
        close_abandoned(
            lambda other: (
                isinstance(other, RunView)
                and not other._in_block
                and not mine.isdisjoint(id(layer.module) for layer in other._context.layers)
            ),
            "model",
        )

    def _require_start(self, call: str) -> None:
        """Raise `ConfigError` where the monitor was never started."""
        if self._running is None:
            raise ConfigError(
                f"{call}: the monitor was not started, so it would measure nothing; put the training into "
                "`with Monitor(...) as monitor:`, or call start() before it and close() after it"
            )

    def _takes(self, call: str) -> bool:
        """Return whether a call has something to do. After the end it has not, of which one warning tells.

        Raises:
            ConfigError: the monitor was never started.
        """
        self._require_start(call)
        if not self._running and not self._said_closed:
            self._said_closed = True
            logger.warning(
                "ess_monitor: %s was called after the monitor was closed, or its start failed: nothing is measured. "
                "Close it after the training, or attach a new one.",
                call,
            )
        return self._alive

    def __rich__(self) -> Table:
        counters = self.snapshot()
        measurement = Measurement(
            step=counters.last_step,
            timestamp_seconds=counters.last_measurement_timestamp_seconds,
            readings=self.readings,
            conditions=self.conditions,
            unknown_reasons=self._results.unknown_reasons,
            overhead_ratio=counters.overhead_ratio,
            interval_steps=counters.interval_steps,
        )
        table = render_table(
            measurement,
            tuple(LayerInfo(name=name, module="", supported=True) for name in self.layers),
            every_n_steps=self._context.config.every_n_steps,
            budget_ratio=self._context.config.overhead_budget_ratio or 1.0,
        )
        table.title = plain_text(self._described)
        return table

    def __repr__(self) -> str:
        return f"<{self._described}>"

    @property
    def _described(self) -> str:
        status = "not started" if self._running is None else self.snapshot().status
        return f"Monitor of {type(self.model).__name__}: {status}, step {self._step}, {len(self.layers)} layers"

    def __reduce__(self) -> tuple[Any, ...]:
        """Be None in copies and pickles, so that a model which holds its monitor can be copied and saved."""
        return type(None), ()
