"""The PyTorch Lightning callback, for `pytorch_lightning` and for `lightning.pytorch`."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ess_monitor.distributed.parallelism import sizes_of_mesh
from ess_monitor.exporters import Exporter
from ess_monitor.integrations.common import CallbackBase, LoopFacts, logger_exporters, loss_factor

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


class ESSMonitorCallback(CallbackBase, _Base):
    """Shows the memory utilization of every sequence mixer of a `LightningModule` while it trains.

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

    _optimizer_steps = 0

    # -- life ---------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Build and start the monitor. After the sanity check and after a checkpoint's state was loaded."""
        facts = LoopFacts(
            rank=trainer.global_rank,
            local_rank=trainer.local_rank,
            world_size=trainer.world_size,
            strategy=type(trainer.strategy).__name__,
            precision=str(trainer.precision),
            grad_scale=lambda: _grad_scale(trainer),
            parallel=sizes_of_mesh(getattr(trainer.strategy, "_device_mesh", None)),
        )
        self._open(pl_module, facts, lambda: self._sinks(trainer))
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

    def _sinks(self, trainer: Any) -> list[Exporter]:
        bar = trainer.progress_bar_callback
        return [*logger_exporters(trainer.loggers), *self._table(print if bar is None else bar.print)]

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

    def __getstate__(self) -> dict[str, Any]:
        """Without what Lightning attaches to a callback in a trainer."""
        attached_by_lightning = ("log", "log_dict")
        mine = super().__getstate__()
        return {name: value for name, value in mine.items() if name not in attached_by_lightning}


def _grad_scale(trainer: Any) -> float | torch.Tensor:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return loss_factor(scaler, trainer.strategy.root_device, trainer.accumulate_grad_batches)


def _metrics(trainer: Any, outputs: Any) -> dict[str, Any]:
    """What the module logged so far, and the loss it returned."""
    metrics = dict(trainer.callback_metrics)
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if isinstance(loss, torch.Tensor):
        metrics["loss"] = loss
    return metrics
