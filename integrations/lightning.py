"""Monitors trainings of PyTorch Lightning, from `pytorch_lightning` or `lightning.pytorch`."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ess_monitor.distributed.parallelism import sizes_of_mesh
from ess_monitor.exporters import Exporter
from ess_monitor.integrations.common import CallbackBase, LoopFacts, loss_factor
from ess_monitor.integrations.loop_logs import log_folder, logger_exporters

_FRAMEWORKS = ("pytorch_lightning", "lightning.pytorch")


def _callback_bases() -> tuple[type, ...]:
    """Return the `Callback` class of each Lightning package that is imported, else of the first that is installed."""
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

    Pass it to a Trainer: the effective state-size goes to every logger of the trainer (with custom charts and heat maps
    where that is TensorBoard), and a table of the layers appears beside the progress bar.

    Args:
        config: a `MonitorConfig`, or its settings as a dictionary (from LightningCLI, for example).
        exporters: further sinks: kinds ("prometheus", "event_log"), their settings, or exporter objects.
        table: print the table of layers in the terminal.
        event_log: write the event log to the loop's log folder, for `ess-monitor report`.
        settings: fields of `MonitorConfig`, instead of or on top of `config`.

    Examples:
        >>> from ess_monitor.integrations.lightning import ESSMonitorCallback
        >>> callback = ESSMonitorCallback(every_n_steps=200, exporters=["prometheus"])
        >>> callback.config.every_n_steps
        200
    """

    _optimizer_steps = 0
    _not_copied = ("log", "log_dict")
    """Lightning sets them on a callback in a trainer."""

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Build and start the monitor, after the sanity check and after a checkpoint's state was loaded."""
        facts = LoopFacts(
            rank=trainer.global_rank,
            local_rank=trainer.local_rank,
            world_size=trainer.world_size,
            strategy=type(trainer.strategy).__name__,
            precision=str(trainer.precision),
            grad_scale=lambda: loss_factor(
                getattr(trainer.precision_plugin, "scaler", None),
                trainer.strategy.root_device,
                trainer.accumulate_grad_batches,
            ),
            step=_steps_done(trainer),
            log_folder=log_folder(trainer.loggers) if trainer.is_global_zero and not trainer.fast_dev_run else None,
            hyperparameters=dict(getattr(pl_module, "hparams", {})),
            parallel=sizes_of_mesh(getattr(trainer.strategy, "_device_mesh", None)),
        )
        self._open(pl_module, facts, lambda: self._sinks(trainer))
        self._optimizer_steps = trainer.global_step

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """End the run as finished."""
        self._close("finished")

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """End the run as failed; as terminated where Lightning was told to end by SIGTERM."""
        self._close("terminated" if getattr(trainer, "received_sigterm", False) else "failed")

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """End the run as failed if it is still open: nothing stays attached."""
        self._close("failed")

    def _sinks(self, trainer: Any) -> list[Exporter]:
        bar = trainer.progress_bar_callback
        return [*logger_exporters(trainer.loggers), *self._table(print if bar is None else bar.print)]

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Report an optimizer step, if this batch made one."""
        if self.monitor is None or trainer.global_step == self._optimizer_steps:
            return
        self._optimizer_steps = trainer.global_step
        metrics = _metrics(trainer, outputs) if self.monitor.armed else None
        steps = _steps_done(trainer) + 1  # the count is increased only after this hook
        replay = _replay(trainer, pl_module, batch, batch_idx) if self.monitor.replay_due else None
        self.monitor.step(metrics, optimizer=trainer.optimizers, step=steps, replay=replay)

    def on_validation_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Take no batch for one of the training until the validation ends, whatever gradients it computes."""
        if self.monitor is not None:
            self.monitor.evaluates(True)

    def on_validation_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Go on with the training."""
        if self.monitor is not None:
            self.monitor.evaluates(False)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Sample the first validation batch where validation batches are the source."""
        monitor = self._validation_monitor()
        if monitor is not None and monitor.sample_due and _is_first_batch(trainer, batch_idx, dataloader_idx):
            monitor.arm()

    def on_validation_batch_end(
        self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Send the sample of the first validation batch to be measured."""
        monitor = self._validation_monitor()
        if monitor is not None and monitor.armed and _is_first_batch(trainer, batch_idx, dataloader_idx):
            monitor.disarm(_metrics(trainer, outputs))

    @property
    def state_key(self) -> str:
        """Return one key for all settings: a resumed run may change them."""
        return "ess_monitor"


def _steps_done(trainer: Any) -> int:
    """Return the optimizer steps so far as Lightning's loggers count them; `global_step` counts each optimizer."""
    steps: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return steps


def _replay(trainer: Any, module: Any, batch: Any, batch_idx: int) -> Callable[[], torch.Tensor] | None:
    """Return a function that runs `training_step` on the batch again and returns its loss, with all logging muted.

    None where `training_step` takes its own batches, or steps the optimizers itself.
    """
    parameters = inspect.signature(module.training_step).parameters
    if not module.automatic_optimization or "dataloader_iter" in parameters:
        return None
    # DDP only adds collectives, which other ranks may not join. FSDP's wrapper is what gathers the parameters.
    is_sharded = isinstance(trainer.strategy.model, FullyShardedDataParallel)
    training_step = trainer.strategy.training_step if is_sharded else module.training_step
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    arguments = (batch, batch_idx)[: 2 if takes_any else len(positional)]

    def loss() -> torch.Tensor:
        with _muted(trainer, module), trainer.precision_plugin.train_step_context():
            outputs = training_step(*arguments)
        found: torch.Tensor = outputs["loss"] if isinstance(outputs, dict) else outputs
        return found

    return loss


@contextmanager
def _muted(trainer: Any, module: Any) -> Iterator[None]:
    """Let the module log into nothing."""
    package = next(name for name in _FRAMEWORKS if _is_of(trainer, name))
    loggers = trainer.loggers
    trainer.loggers = [importlib.import_module(f"{package}.loggers.logger").DummyLogger() for _ in loggers]
    module.__dict__.update(log=_ignore, log_dict=_ignore)
    try:
        yield
    finally:
        trainer.loggers = loggers
        for name in ("log", "log_dict"):
            module.__dict__.pop(name, None)


def _is_of(trainer: Any, package: str) -> bool:
    return any(cls.__module__.startswith(f"{package}.") for cls in type(trainer).__mro__)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stand in for a method that logs."""


def _is_first_batch(trainer: Any, batch_idx: int, dataloader_idx: int) -> bool:
    return batch_idx == 0 and dataloader_idx == 0 and not trainer.sanity_checking


def _metrics(trainer: Any, outputs: Any) -> dict[str, Any]:
    """Return what the module has logged, and the loss it returned."""
    metrics = dict(trainer.callback_metrics)
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if isinstance(loss, torch.Tensor):
        metrics["loss"] = loss
    return metrics
