"""Logs findings and actions through the standard library's logger `ess_monitor`.

Each is one line of `key=value` pairs, which people can read and log stores can filter:

    finding step=1200 layer="blocks.1.mixer" condition=collapsed previous=healthy utilization_ratio=0.185 reason="..."

Of the evidence on it the line has the outcome and the numbers: `evidence=loud evidence_basis=loss evidence_m50=...`.
The same fields travel on the log record as `record.ess_monitor`, a dictionary, for handlers that write JSON.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any, Literal

from ess_monitor import validation
from ess_monitor.exporters.evidence import evidence_fields
from ess_monitor.records import CONDITION_INFO, Action, Finding, Measurement, RunInfo, RunStatus, Snapshot
from ess_monitor.validation.settings import Settings

_WARNING_OUTCOMES = {"failed", "rolled_back"}
_UNQUOTED = {"condition", "previous", "action", "outcome", "evidence", "evidence_basis"}
"""Fields with a fixed vocabulary. Names that a model or a user chose are always quoted."""


class LogConfig(Settings):
    """Settings of the log lines. The logging configuration decides where they go and how they look."""

    kind: Literal["log"] = "log"
    """Which exporter this is."""


class LogExporter:
    """Logs every finding and action, and the run's beginning and end.

    Level WARNING: a layer became saturated or collapsed, a treatment failed or was rolled back, the run failed.
    Everything else is INFO, which Python drops until logging is configured (`logging.basicConfig(level=logging.INFO)`).

    Args:
        config: there is nothing to set so far.
        logger: receives the lines; None: the logger `ess_monitor`.

    Examples:
        >>> LogExporter().name
        'log'
    """

    name = "log"
    inline = False

    def __init__(self, config: LogConfig | None = None, logger: logging.Logger | None = None) -> None:
        self.config = validation.optional("config", config, LogConfig) or LogConfig()
        self._logger = validation.optional("logger", logger, logging.Logger) or logging.getLogger("ess_monitor")
        self._run: RunInfo | None = None

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """Log that the run started."""
        self._run = run
        self._log(logging.INFO, "run_started", {"model": run.model, "layers": len(run.layers), **run.addresses})

    def export(self, measurement: Measurement) -> None:
        """Log one line per finding and per action."""
        for finding in measurement.findings:
            level = logging.WARNING if CONDITION_INFO[finding.condition].needs_attention else logging.INFO
            self._log(level, "finding", _fields(finding))
        for action in measurement.actions:
            level = logging.WARNING if action.outcome in _WARNING_OUTCOMES else logging.INFO
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
    """Return the fields of a record that have a value."""
    fields = record.model_dump(mode="json", exclude={"evidence"})
    if isinstance(record, Finding) and record.evidence is not None:
        fields |= evidence_fields(record.evidence)
    return {name: value for name, value in fields.items() if name == "layer" or value not in (None, "")}


def _value(name: str, value: Any) -> str:
    """Format a value as one word or one quoted string; JSON escapes control characters.

    >>> _value("layer", "a\\nb"), _value("strength", 0.5), _value("condition", "collapsed")
    ('"a\\\\nb"', '0.5', 'collapsed')
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if name in _UNQUOTED or not isinstance(value, str) else json.dumps(value)
