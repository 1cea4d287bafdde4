"""Defines every exporter's settings as one type; builds exporters from settings, and picks those of a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, Field

from ess_monitor import validation
from ess_monitor.errors import ConfigError
from ess_monitor.exporters.base import Exporter
from ess_monitor.exporters.event_log.exporter import EventLogConfig, EventLogExporter
from ess_monitor.exporters.log import LogConfig, LogExporter
from ess_monitor.exporters.prometheus.config import PrometheusConfig
from ess_monitor.exporters.prometheus.exporter import PrometheusExporter
from ess_monitor.exporters.prometheus.identity import IdentifiedConfig, RunIdentity
from ess_monitor.exporters.prometheus.pushgateway import PushgatewayConfig, PushgatewayExporter
from ess_monitor.exporters.prometheus.textfile import TextfileConfig, TextfileExporter
from ess_monitor.exporters.tensorboard.exporter import TensorBoardConfig, TensorBoardExporter
from ess_monitor.exporters.terminal.exporter import TerminalConfig, TerminalExporter

AnyConfig = (
    PrometheusConfig
    | PushgatewayConfig
    | TextfileConfig
    | TensorBoardConfig
    | EventLogConfig
    | TerminalConfig
    | LogConfig
)
ExporterConfig = Annotated[
    AnyConfig,
    Field(discriminator="kind"),
    BeforeValidator(lambda value: {"kind": value} if isinstance(value, str) else value),
]
"""Settings of any exporter, told apart by `kind`. In a pydantic model a bare name stands for its defaults:
`["prometheus", {"kind": "event_log", "path": "x.jsonl"}]`."""

_EXPORTERS: dict[type[AnyConfig], Callable[[Any], Exporter]] = {
    PrometheusConfig: PrometheusExporter,
    PushgatewayConfig: PushgatewayExporter,
    TextfileConfig: TextfileExporter,
    TensorBoardConfig: TensorBoardExporter,
    EventLogConfig: EventLogExporter,
    TerminalConfig: TerminalExporter,
    LogConfig: LogExporter,
}

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def build_exporter(config: AnyConfig) -> Exporter:
    """Build the exporter of these settings, not started yet.

    Raises:
        ConfigError: `config` is not the settings of an exporter.

    Example:
        >>> build_exporter(EventLogConfig(path="events.jsonl")).name
        'event_log'
    """
    for kind, exporter in _EXPORTERS.items():
        if isinstance(config, kind):
            return exporter(config)
    raise ConfigError(
        f"config: {validation.type_of(config)} is not the settings of an exporter; pass settings such as "
        "PrometheusConfig(port=0), or give names and mappings to MonitorConfig(exporters=...)"
    )


def configs_of_rank(configs: Iterable[ConfigT], rank: int, local_rank: int) -> tuple[ConfigT, ...]:
    """Return the settings whose exporters run on this rank: by `ranks` where they have it, on rank 0 otherwise."""
    hint = "settings such as LogConfig()"
    checked: tuple[ConfigT, ...] = validation.several("configs", configs, BaseModel, hint=hint)  # type: ignore[arg-type]
    here = RunIdentity("", rank, local_rank)
    return tuple(
        config
        for config in checked
        if here.takes_part(config.ranks if isinstance(config, IdentifiedConfig) else "zero")
    )
