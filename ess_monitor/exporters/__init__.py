"""Writes measurements to Prometheus (scraped, pushed, or through a file), TensorBoard, a JSON-lines event log, the
terminal, the process's log, and the loggers of training frameworks.

Importing this package imports no sink: `prometheus_client`, `tensorboard` and `rich` are imported by the exporter that
needs them, when it starts.
"""

from __future__ import annotations

from ess_monitor.exporters.base import Exporter
from ess_monitor.exporters.config import ExporterConfig, build_exporter, configs_of_rank
from ess_monitor.exporters.event_log.events import Event, EventReader, read_event_log
from ess_monitor.exporters.event_log.exporter import EventLogConfig, EventLogExporter
from ess_monitor.exporters.framework_logger import LoggerExporter
from ess_monitor.exporters.hub import ExporterHub
from ess_monitor.exporters.log import LogConfig, LogExporter
from ess_monitor.exporters.prometheus.auth import AuthConfig
from ess_monitor.exporters.prometheus.config import PrometheusConfig
from ess_monitor.exporters.prometheus.exporter import PrometheusExporter
from ess_monitor.exporters.prometheus.identity import RunIdentity
from ess_monitor.exporters.prometheus.pushgateway import PushgatewayConfig, PushgatewayExporter
from ess_monitor.exporters.prometheus.textfile import TextfileConfig, TextfileExporter
from ess_monitor.exporters.scalars import scalars
from ess_monitor.exporters.tensorboard.exporter import TensorBoardConfig, TensorBoardExporter
from ess_monitor.exporters.terminal.exporter import TerminalConfig, TerminalExporter
from ess_monitor.exporters.terminal.table import render_table
from ess_monitor.exporters.wandb.exporter import WandbExporter

__all__ = [
    "AuthConfig",
    "Event",
    "EventLogConfig",
    "EventLogExporter",
    "EventReader",
    "Exporter",
    "ExporterConfig",
    "ExporterHub",
    "LogConfig",
    "LogExporter",
    "LoggerExporter",
    "PrometheusConfig",
    "PrometheusExporter",
    "PushgatewayConfig",
    "PushgatewayExporter",
    "RunIdentity",
    "TensorBoardConfig",
    "TensorBoardExporter",
    "TerminalConfig",
    "TerminalExporter",
    "TextfileConfig",
    "TextfileExporter",
    "WandbExporter",
    "build_exporter",
    "configs_of_rank",
    "read_event_log",
    "render_table",
    "scalars",
]
