"""Findings and actions as lines of the process's own log, through the standard library's logger `ess_monitor`.

One line each, as `key=value` pairs, so that a log store can filter them and a person can read them:

    finding step=1200 layer="blocks.1.mixer" condition=collapsed previous=healthy utilization_ratio=0.185 reason="..."

The same fields travel on the log record as `record.ess_monitor`, a dictionary, for handlers that write JSON.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ess_monitor import validation
from ess_monitor.records import Action, Finding, Measurement, RunInfo, RunStatus, Snapshot

_WARN_CONDITIONS = {"saturated", "collapsed"}
_WARN_OUTCOMES = {"failed", "rolled_back"}
# Words of a fixed vocabulary stand bare; what a model or a user named is always quoted.
_BARE = {"condition", "previous", "action", "outcome"}


class LogConfig(BaseModel):
    """Settings of the log lines. Where they go and how they look is the business of the logging configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["log"] = "log"
    """Which exporter this is."""


class LogExporter:
    """Logs every finding and action, and the run's beginning and end.

    Level WARNING: a layer became saturated or collapsed, a treatment failed or was rolled back. Everything else: INFO,
    which Python's logging drops until it is configured (`logging.basicConfig(level=logging.INFO)`).

    Args:
        config: nothing to set so far.
        logger: where the lines go.

    Example:
        >>> LogExporter().name
        'log'
    """

    inline = False

    def __init__(self, config: LogConfig | None = None, logger: logging.Logger | None = None) -> None:
        self.name = "log"
        self.config = validation.optional("config", config, LogConfig) or LogConfig()
        self._logger = validation.optional("logger", logger, logging.Logger) or logging.getLogger("ess_monitor")
        self._run: RunInfo | None = None

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """Log that the run began."""
        self._run = run
        self._log(logging.INFO, "run_started", {"model": run.model, "layers": len(run.layers)})

    def export(self, measurement: Measurement) -> None:
        """One line per finding and per action."""
        for finding in measurement.findings:
            level = logging.WARNING if finding.condition in _WARN_CONDITIONS else logging.INFO
            self._log(level, "finding", _fields(finding))
        for action in measurement.actions:
            level = logging.WARNING if action.outcome in _WARN_OUTCOMES else logging.INFO
            self._log(level, "action", _fields(action))

    def close(self, status: RunStatus) -> None:
        """Log how the run ended."""
        if self._run is not None:
            self._log(logging.WARNING if status == "failed" else logging.INFO, "run_finished", {"status": status})
        self._run = None

    def _log(self, level: int, event: str, fields: dict[str, Any]) -> None:
        run = {"run": self._run.run_name} if self._run is not None else {}
        pairs = " ".join(f"{name}={_value(name, value)}" for name, value in {**run, **fields}.items())
        self._logger.log(level, "%s %s", event, pairs, extra={"ess_monitor": {"event": event, **run, **fields}})


def _fields(record: Finding | Action) -> dict[str, Any]:
    """What the record says; what it leaves open is left out."""
    fields = record.model_dump(mode="json")
    return {name: value for name, value in fields.items() if name == "layer" or value not in (None, "")}


def _value(name: str, value: Any) -> str:
    """A value as one word or one quoted string without control characters, which JSON escapes.

    >>> _value("layer", "a\\nb"), _value("strength", 0.5), _value("condition", "collapsed")
    ('"a\\\\nb"', '0.5', 'collapsed')
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if name in _BARE or not isinstance(value, str) else json.dumps(value)
