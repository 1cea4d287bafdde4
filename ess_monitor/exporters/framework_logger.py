"""Sends scalars to a logger of the training framework (W&B, MLflow, CSV, ...)."""

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
        """Do nothing: the framework has opened its logger."""

    def export(self, measurement: Measurement) -> None:
        """Log the scalars of one measurement, in one call."""
        self._log(scalars(measurement), step=measurement.step)

    def close(self, status: RunStatus) -> None:
        """Do nothing: the framework closes its logger."""
