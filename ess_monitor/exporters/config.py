"""Defines every exporter's settings as one type; builds exporters from settings, and picks those of a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar, get_args

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
    BeforeValidator(lambda value: _of_kind(value)),
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

_LOGGERS = ("aim", "clearml", "comet", "comet_ml", "csv", "mlflow", "neptune", "swanlab", "trackio", "wandb")
"""Loggers of the frameworks that someone may look for here."""

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def _of_kind(value: Any) -> Any:
    """Return the settings of an exporter whose kind is known.

    Raises:
        ValueError: there is no such kind.
    """
    if isinstance(value, str):
        value = {"kind": value}
    if isinstance(value, get_args(AnyConfig)):
        return value
    kinds = [config.model_fields["kind"].default for config in _EXPORTERS]
    allowed = f"the kinds are {', '.join(kinds)}"
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a kind, or a mapping with one, and is {validation.type_of(value)}; {allowed}")
    kind = value.get("kind")
    if kind is None:
        raise ValueError(f"a kind must be given, as in {{'kind': 'prometheus'}}; {allowed}")
    if kind in _LOGGERS:
        raise ValueError(
            f"{kind} is no exporter: readings go through the trainer's own logger (Lightning's and Fabric's logger, "
            "report_to of the Hugging Face Trainer, log_with of accelerate), so leave it out here and set that. In a "
            f"loop of your own pass an object, such as WandbExporter(run), to Monitor(exporters=...); {allowed}"
        )
    if kind not in kinds:
        close = get_close_matches(str(kind)[:100], kinds, 1)
        raise ValueError(f"no kind {validation.shown(kind)}; {f'did you mean {close[0]}? ' if close else ''}{allowed}")
    return value


def build_exporter(config: AnyConfig) -> Exporter:
    """Build the exporter of these settings, not started yet.

    Raises:
        ConfigError: `config` is not the settings of an exporter.

    Examples:
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
