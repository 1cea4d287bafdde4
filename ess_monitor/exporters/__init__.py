"""Where measurements go: Prometheus, TensorBoard, a JSON-lines event log, the terminal.

This room knows `ess_monitor.records` only. Importing it imports no sink: `prometheus_client`, `tensorboard` and `rich`
are imported by the exporter that needs them, when it starts.
"""

from __future__ import annotations

from ess_monitor.exporters.base import Exporter
from ess_monitor.exporters.config import ExporterConfig, build_exporter
from ess_monitor.exporters.event_log import EventLogConfig, EventLogExporter
from ess_monitor.exporters.events import Event, EventReader, read_event_log
from ess_monitor.exporters.hub import ExporterHub
from ess_monitor.exporters.prometheus import PrometheusConfig, PrometheusExporter
from ess_monitor.exporters.scalars import scalars
from ess_monitor.exporters.table import render_table
from ess_monitor.exporters.tensorboard import TensorBoardConfig, TensorBoardExporter
from ess_monitor.exporters.terminal import TerminalConfig, TerminalExporter

__all__ = [
    "Event",
    "EventLogConfig",
    "EventLogExporter",
    "EventReader",
    "Exporter",
    "ExporterConfig",
    "ExporterHub",
    "PrometheusConfig",
    "PrometheusExporter",
    "TensorBoardConfig",
    "TensorBoardExporter",
    "TerminalConfig",
    "TerminalExporter",
    "build_exporter",
    "read_event_log",
    "render_table",
    "scalars",
]
