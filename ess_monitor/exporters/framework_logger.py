"""Sends scalars to a logger of the training framework (MLflow, CSV, ...)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ess_monitor import validation
from ess_monitor.errors import ConfigError
from ess_monitor.exporters.scalars import scalars
from ess_monitor.records import Measurement, RunInfo, RunStatus, Snapshot


class LoggerExporter:
    """Calls `log(metrics, step=...)` with the scalars of each measurement, on the training thread.

    The step is the one of the sample, some steps before the present one. A W&B run, which ignores lower steps than its
    present one, needs a `WandbExporter`.

    Args:
        name: of the sink, in counts and messages.
        log: takes the scalars by tag, and the step.
        flush: called when the run ends, for loggers that keep rows in memory.

    Raises:
        ConfigError: `log` or `flush` cannot be called, or `log` is that of a W&B run.

    Examples:
        >>> sink = LoggerExporter("csv", lambda metrics, step: print(step, sorted(metrics)))
        >>> sink.name, sink.inline
        ('csv', True)
    """

    inline = True

    def __init__(self, name: str, log: Callable[..., Any], *, flush: Callable[[], Any] | None = None) -> None:
        self.name = validation.instance("name", name, str, hint='for example "csv"')
        self._log = validation.function("log", log, hint="such as logger.log_metrics")
        self._flush = None if flush is None else validation.function("flush", flush)
        if hasattr(getattr(log, "__self__", None), "define_metric"):
            raise ConfigError("log: a W&B run ignores what comes with a lower step; pass WandbExporter(run) instead")

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """Do nothing: the framework has opened its logger."""

    def export(self, measurement: Measurement) -> None:
        """Log the scalars of one measurement, in one call."""
        self._log(scalars(measurement), step=measurement.step)

    def close(self, status: RunStatus) -> None:
        """Flush the logger; the framework closes it."""
        if self._flush is not None:
            self._flush()
