"""The PyTorch Lightning callback, for `pytorch_lightning` and for `lightning.pytorch`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ess_monitor.config import MonitorConfig
from ess_monitor.errors import CheckpointError, ConfigError
from ess_monitor.exporters import Exporter, TensorBoardExporter, TerminalConfig, TerminalExporter
from ess_monitor.exporters.loggers import LoggerExporter
from ess_monitor.monitor import Monitor
from ess_monitor.runtime import Agreement

_FRAMEWORKS = ("pytorch_lightning", "lightning.pytorch")


def _callback_bases() -> tuple[type, ...]:
    """The `Callback` classes of the Lightning packages in use: those already imported, else the first installed."""
    names = [name for name in _FRAMEWORKS if name in sys.modules]
    for name in names or _FRAMEWORKS:
        try:
            modules = [importlib.import_module(n) for n in (names or [name])]
        except ModuleNotFoundError:
            continue
        return tuple(module.Callback for module in modules)
    raise ModuleNotFoundError(
        'ess_monitor.integrations.lightning needs PyTorch Lightning: pip install "ess-monitor[lightning]"'
    )


if TYPE_CHECKING:
    from pytorch_lightning import Callback as _Base
else:
    _Base = type("_Base", _callback_bases(), {})


class ESSMonitorCallback(_Base):
    """Shows the memory utilisation of every sequence mixer of a `LightningModule` while it trains.

    Attach it to a Trainer and that is all: the effective state-size goes through every logger the trainer has (with
    custom charts and heat maps where that is TensorBoard), and a table of the layers appears beside the progress bar.

    Args:
        config: a `MonitorConfig`, or its settings as a dictionary (from LightningCLI, for example).
        exporters: further sinks: kinds ("prometheus", "event_log"), their settings, or exporter objects.
        table: print the table of layers in the terminal.
        settings: fields of `MonitorConfig`, instead of or on top of `config`.

    Example:
        >>> from ess_monitor.integrations.lightning import ESSMonitorCallback
        >>> callback = ESSMonitorCallback(every_n_steps=200, exporters=["prometheus"])
        >>> callback.config.every_n_steps
        200
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
        exporters = tuple(exporters)
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
        """The monitor of the fit that runs now, or of the last one."""
        self._live_exporters = live
        self._state: dict[str, Any] | None = None
        self._optimizer_steps = 0

    # -- life ---------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Build and start the monitor. After the sanity check and after a checkpoint's state was loaded.

        On rank 0 alone, unless the autopilot may act: then every rank measures, and all decide on the same numbers.
        """
        together = trainer.world_size > 1 and self.config.autopilot.mode == "auto"
        if not (trainer.is_global_zero or together):
            return
        speaks = trainer.is_global_zero
        monitor = Monitor(
            pl_module,
            self.config if speaks else self.config.model_copy(update={"exporters": ()}),
            exporters=(*self._logger_exporters(trainer), *self._live_exporters) if speaks else (),
            strategy=type(trainer.strategy).__name__,
            world_size=trainer.world_size,
            precision=str(trainer.precision),
            grad_scale=lambda: _grad_scale(trainer),
            agreement=Agreement() if together else None,
        )
        if self._state is not None:
            monitor.load_state_dict(self._state)
        monitor.start()
        self.monitor = monitor
        self._optimizer_steps = trainer.global_step

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """The run came to its end."""
        self._close("finished")

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """The run did not."""
        self._close("failed")

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Whatever happened, nothing of ours stays attached or open."""
        self._close("failed")

    def _close(self, status: Any) -> None:
        if self.monitor is not None:
            self.monitor.close(status)
            self._state = self.monitor.state_dict()

    # -- steps --------------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One comparison, unless an optimizer step was made."""
        if self.monitor is None or trainer.global_step == self._optimizer_steps:
            return
        self._optimizer_steps = trainer.global_step
        metrics = _metrics(trainer, outputs) if self.monitor.armed else None
        # The axis of Lightning's own loggers: steps of the loop, which differ from `global_step` when a step has
        # several optimizers. It is counted up only after this hook.
        steps = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        self.monitor.step(metrics, optimizer=trainer.optimizers, step=steps)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Sample the first validation batch when that is where samples come from."""
        if self._samples_validation(trainer, batch_idx, dataloader_idx) and self.monitor.sample_due:  # type: ignore[union-attr]
            self.monitor.arm()  # type: ignore[union-attr]

    def on_validation_batch_end(
        self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Hand over what the first validation batch gave."""
        if self._samples_validation(trainer, batch_idx, dataloader_idx) and self.monitor.armed:  # type: ignore[union-attr]
            self.monitor.disarm(_metrics(trainer, outputs))  # type: ignore[union-attr]

    def _samples_validation(self, trainer: Any, batch_idx: int, dataloader_idx: int) -> bool:
        return (
            self.monitor is not None
            and self.config.capture.source == "validation"
            and batch_idx == 0
            and dataloader_idx == 0
            and not trainer.sanity_checking
        )

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """One per run, whatever the settings: a resumed run may change them."""
        return "ess_monitor"

    def state_dict(self) -> dict[str, Any]:
        """The monitor's state, for Lightning's checkpoint."""
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
        attached_by_lightning = ("log", "log_dict")
        mine = {name: value for name, value in self.__dict__.items() if name not in attached_by_lightning}
        return {**mine, "monitor": None, "_state": self.state_dict() or None}

    # -- exporters ----------------------------------------------------------------------------------------------------

    def _logger_exporters(self, trainer: Any) -> list[Exporter]:
        sinks: list[Exporter] = []
        for logger in trainer.loggers:
            if type(logger).__name__ == "TensorBoardLogger":
                sinks.append(TensorBoardExporter(writer=logger.experiment))
            else:
                sinks.append(LoggerExporter(type(logger).__name__, logger.log_metrics))
        if self.table:
            bar = trainer.progress_bar_callback
            sinks.append(TerminalExporter(TerminalConfig(), write=print if bar is None else bar.print))
        return sinks


def _grad_scale(trainer: Any) -> float | torch.Tensor:
    """What Lightning multiplies the loss with before backward: the loss scaler's scale over the accumulation steps."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    steps: int = trainer.accumulate_grad_batches
    if scaler is None:
        return 1.0 / steps
    scale: torch.Tensor = scaler.scale(torch.ones((), device=trainer.strategy.root_device))
    return scale / steps


def _metrics(trainer: Any, outputs: Any) -> dict[str, Any]:
    """What the module logged so far, and the loss it returned."""
    metrics = dict(trainer.callback_metrics)
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if isinstance(loss, torch.Tensor):
        metrics["loss"] = loss
    return metrics
