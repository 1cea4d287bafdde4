"""Every exporter's settings as one type, and the way from settings to an exporter."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ess_monitor import validation
from ess_monitor.errors import ConfigError
from ess_monitor.exporters.base import Exporter
from ess_monitor.exporters.event_log.exporter import EventLogConfig, EventLogExporter
from ess_monitor.exporters.log import LogConfig, LogExporter
from ess_monitor.exporters.prometheus.config import PrometheusConfig
from ess_monitor.exporters.prometheus.exporter import PrometheusExporter
from ess_monitor.exporters.prometheus.pushgateway import PushgatewayConfig, PushgatewayExporter
from ess_monitor.exporters.prometheus.textfile import TextfileConfig, TextfileExporter
from ess_monitor.exporters.tensorboard.exporter import TensorBoardConfig, TensorBoardExporter
from ess_monitor.exporters.terminal.exporter import TerminalConfig, TerminalExporter


def _from_name(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


AnyConfig = (
    PrometheusConfig
    | PushgatewayConfig
    | TextfileConfig
    | TensorBoardConfig
    | EventLogConfig
    | TerminalConfig
    | LogConfig
)
ExporterConfig = Annotated[AnyConfig, Field(discriminator="kind"), BeforeValidator(_from_name)]
"""Settings of any exporter, told apart by `kind`. In a pydantic model a bare name stands for its defaults:
`["prometheus", {"kind": "event_log", "path": "x.jsonl"}]`."""


def build_exporter(config: AnyConfig) -> Exporter:
    """The exporter of these settings, not started yet.

    Raises:
        ConfigError: `config` is no settings of an exporter.

    Example:
        >>> build_exporter(EventLogConfig(path="events.jsonl")).name
        'event_log'
    """
    match config:
        case PrometheusConfig():
            return PrometheusExporter(config)
        case PushgatewayConfig():
            return PushgatewayExporter(config)
        case TextfileConfig():
            return TextfileExporter(config)
        case TensorBoardConfig():
            return TensorBoardExporter(config)
        case EventLogConfig():
            return EventLogExporter(config)
        case TerminalConfig():
            return TerminalExporter(config)
        case LogConfig():
            return LogExporter(config)
    raise ConfigError(
        f"config: {validation.type_of(config)} is no settings of an exporter; pass settings such as "
        "PrometheusConfig(port=0), or give names and mappings to MonitorConfig(exporters=...)"
    )
