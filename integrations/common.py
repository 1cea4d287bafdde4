"""What the callbacks of all training loops share: settings, the monitor that runs, its state, its end.

A callback says what it knows of its loop (`LoopFacts`) and calls `_open`, `_close` and `monitor.step`; everything else
is here, so that a setting means the same in every loop.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ess_monitor import validation
from ess_monitor.config import MonitorConfig
from ess_monitor.distributed.parallelism import require_data_parallel
from ess_monitor.distributed.ranks import measure_together
from ess_monitor.errors import CheckpointError, ConfigError
from ess_monitor.exporters import Exporter, TensorBoardExporter, TerminalConfig, TerminalExporter
from ess_monitor.exporters.config import configs_of_rank
from ess_monitor.exporters.framework_logger import LoggerExporter
from ess_monitor.monitor import Monitor
from ess_monitor.records import RunStatus

GradScale = Callable[[], "float | torch.Tensor"]


def require(module: str, *others: str, extra: str) -> None:
    """Say which extra is missing, unless one of the modules can be imported. Nothing is imported here.

    Raises:
        ModuleNotFoundError: none of them is installed.
    """
    if not any(_installed(name) for name in (module, *others)):
        raise ModuleNotFoundError(f'this integration needs {module}: pip install "ess-monitor[{extra}]"')


def _installed(name: str) -> bool:
    parts = name.split(".")
    # A parent that is missing makes find_spec raise; asking from the top down never gets there.
    return all(find_spec(".".join(parts[: k + 1])) is not None for k in range(len(parts)))


def loss_factor(scaler: Any, device: torch.device, accumulation_steps: float) -> float | torch.Tensor:
    """What a loop multiplies the loss with before backward: the loss scaler's scale over the accumulation steps.

    Args:
        scaler: a `torch.amp.GradScaler`, or None. It is asked on its device, so nothing waits.
        device: where the loss lives.
        accumulation_steps: what the loss is divided by.

    Example:
        >>> loss_factor(None, torch.device("cpu"), 4)
        0.25
    """
    if scaler is None:
        return 1.0 / accumulation_steps
    scale: torch.Tensor = scaler.scale(torch.ones((), device=device))
    return scale / accumulation_steps


@dataclass(frozen=True)
class LoopFacts:
    """What a callback knows of the loop it is in."""

    rank: int
    """Of this process. Rank 0 reports."""
    local_rank: int
    """Rank on its machine."""
    world_size: int
    strategy: str
    precision: str
    grad_scale: GradScale
    """As for `Monitor`; asked during backward."""
    step: int = 0
    """Optimizer steps made so far, for a run that resumes without a state of the monitor."""
    scale_known: bool = True
    """False where an engine scales the loss out of sight (DeepSpeed, Megatron-LM): the gradient of a regularizer could
    not be scaled alike, so the autopilot must not act."""
    parallel: Mapping[str, int] = field(default_factory=dict)
    """Over how many processes the loop's settings split layers ("pipeline"), tokens ("context") or heads ("tensor")."""


def logger_exporters(loggers: Iterable[Any]) -> list[Exporter]:
    """A sink for every logger of Lightning or Fabric; TensorBoard's also gets charts and heat maps."""
    sinks: list[Exporter] = []
    for logger in loggers:
        if type(logger).__name__ == "TensorBoardLogger":
            sinks.append(TensorBoardExporter(writer=logger.experiment))
        else:
            sinks.append(LoggerExporter(type(logger).__name__, logger.log_metrics))
    return sinks


class CallbackBase:
    """Settings, running monitor and state of a callback.

    Args:
        config: a `MonitorConfig`, or its settings as a dictionary (from a configuration file, for example).
        exporters: further sinks: kinds ("prometheus", "event_log"), their settings, or exporter objects.
        table: print the table of layers in the terminal.
        settings: fields of `MonitorConfig`, instead of or on top of `config`.

    Raises:
        ConfigError: a setting is unknown or has a value it cannot have.
    """

    def __init__(
        self,
        config: MonitorConfig | dict[str, Any] | None = None,
        *,
        exporters: Iterable[str | dict[str, Any] | Exporter] = (),
        table: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        exporters = validation.listed("exporters", exporters, hint='kinds such as "prometheus", settings, exporters')
        validation.flag("table", table)
        live = tuple(item for item in exporters if isinstance(item, Exporter) and not isinstance(item, (str, dict)))
        given = tuple(item for item in exporters if not any(item is other for other in live))
        if given:
            settings["exporters"] = given
        if isinstance(config, MonitorConfig):
            config = config.model_dump()
        elif config is not None and not isinstance(config, dict):
            raise ConfigError(f"config: {type(config).__name__} given; pass a MonitorConfig, a dictionary or nothing")
        self.config = MonitorConfig.load(environment=True, **{**(config or {}), **settings})
        self.table = table
        self.monitor: Monitor | None = None
        """The monitor of the training that runs now, or of the last one. None on ranks that do not measure."""
        self._live_exporters = live
        self._state: dict[str, Any] | None = None
        self._running = False
        self._if_dropped: weakref.finalize[..., Any] | None = None

    # -- life ---------------------------------------------------------------------------------------------------------

    def _open(self, model: nn.Module, facts: LoopFacts, sinks: Callable[[], Iterable[Exporter]]) -> None:
        """Build the monitor, give it the state that was loaded, and start it.

        On rank 0, and on the ranks that an exporter asks for (`ranks`), each measuring its own data. When the autopilot
        may act, or several ranks are to measure (`distributed.ranks`), on every rank, and all judge the same numbers.

        Raises:
            ConfigError: mode auto where the loss is scaled out of sight, or a model whose layers or tokens are spread
                over processes.
        """
        acts = self.config.autopilot.mode == "auto"
        if acts and not facts.scale_known:
            raise ConfigError(
                f'autopilot: mode "auto" is not possible under {facts.strategy}, which scales the loss out of sight; '
                'use "advise"'
            )
        # Before some ranks are left out: all of them end here, or none.
        require_data_parallel(model, facts.parallel, acts=acts, source=self.config.capture.source)
        exporters = configs_of_rank(self.config.exporters, facts.rank, facts.local_rank)
        speaks = facts.rank == 0
        if not (speaks or exporters or measure_together(self.config.distributed, facts.world_size, acts=acts)):
            return
        monitor = Monitor(
            model,
            self.config.model_copy(update={"exporters": exporters}),
            exporters=(*sinks(), *self._live_exporters) if speaks else (),
            strategy=facts.strategy,
            world_size=facts.world_size,
            precision=facts.precision,
            grad_scale=facts.grad_scale,
        )
        if self._state is not None:
            monitor.load_state_dict(self._state)
        elif facts.step > 0:
            monitor.load_state_dict({**monitor.state_dict(), "step": facts.step})
        monitor.start()
        self.monitor, self._running = monitor, True
        # A loop that dies without telling its callbacks, and is dropped with them, still ends the run in the exporters.
        self._if_dropped = weakref.finalize(self, monitor.close, "failed")
        self._if_dropped.atexit = False  # the monitor sees to that itself

    def _close(self, status: RunStatus) -> None:
        if self.monitor is None or not self._running:
            return
        self._running = False
        if self._if_dropped is not None:
            self._if_dropped.detach()
        self.monitor.close(status)
        self._state = self.monitor.state_dict()

    def _table(self, write: Callable[[str], None]) -> list[Exporter]:
        return [TerminalExporter(TerminalConfig(), write=write)] if self.table else []

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The monitor's state: plain values and tensors. Empty before the first training."""
        return self.monitor.state_dict() if self.monitor is not None else (self._state or {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the monitor is built; an unreadable one raises `CheckpointError` then."""
        if not isinstance(state_dict, dict):
            raise CheckpointError(
                f"state_dict: {type(state_dict).__name__} given; expected the dictionary of state_dict()"
            )
        self._state = state_dict or None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the settings and the state, not the running monitor."""
        idle = {"monitor": None, "_running": False, "_if_dropped": None, "_state": self.state_dict() or None}
        return {**self.__dict__, **idle}
