"""Scalars through a logger of the training framework, whichever it is (W&B, MLflow, CSV, ...)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ess_monitor.exporters.scalars import scalars
from ess_monitor.records import Measurement, RunInfo, RunStatus, Snapshot


class LoggerExporter:
    """Calls `log(metrics, step=...)` with the scalars of each measurement, on the training thread.

    Example:
        >>> sink = LoggerExporter("csv", lambda metrics, step: print(step, sorted(metrics)))
        >>> sink.name, sink.inline
        ('csv', True)
    """

    inline = True

    def __init__(self, name: str, log: Callable[..., Any]) -> None:
        self.name = name
        self._log = log

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """The logger is open already: it belongs to the framework."""

    def export(self, measurement: Measurement) -> None:
        """One call, one step."""
        self._log(scalars(measurement), step=measurement.step)

    def close(self, status: RunStatus) -> None:
        """The framework closes its own logger."""
