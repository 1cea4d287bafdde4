"""Monitors training loops that use Lightning Fabric, from `lightning.fabric` or `lightning_fabric`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ess_monitor.distributed.parallelism import sizes_of_mesh
from ess_monitor.errors import ConfigError
from ess_monitor.evidence.counterfactual import Replay
from ess_monitor.exporters import Exporter
from ess_monitor.integrations.common import ExplicitLoop, LoopFacts, loss_factor, require
from ess_monitor.integrations.loop_logs import log_folder, logger_exporters
from ess_monitor.pipeline.context import Metrics

require("lightning_fabric", "lightning.fabric", extra="lightning")


class ESSMonitorCallback(ExplicitLoop):
    """Shows the memory utilization of every sequence mixer while a loop with Fabric trains.

    Pass it to `Fabric(callbacks=[...])`, which calls it at every optimizer step. `watch` names the model, the
    with-block is the run, and `step` passes the metrics. Loops that call hooks instead use
    `fabric.call("on_train_start")`, `fabric.call("on_train_batch_end", outputs)`, `fabric.call("on_train_end")` and
    `fabric.call("on_exception", error)`. For `fabric.save` and `fabric.load` put it beside the model:
    `{"model": model, "optimizer": optimizer, "ess_monitor": ess}`.

    Args:
        config: a `MonitorConfig`, or its settings as a dictionary.
        exporters: further sinks: kinds ("prometheus", "event_log"), their settings, or exporter objects.
        table: print the table of layers in the terminal.
        event_log: write the event log to the loop's log folder, for `ess-monitor report`.
        settings: fields of `MonitorConfig`, instead of or on top of `config`.

    Examples:
        >>> from ess_monitor.integrations.fabric import ESSMonitorCallback
        >>> callback = ESSMonitorCallback(every_n_steps=200, exporters=["prometheus"])
        >>> callback.config.every_n_steps
        200
    """

    _fabric: Any = None
    _divisor = 1
    _stepped: tuple[torch.optim.Optimizer, ...] = ()
    """Optimizers that made a step since the last call of `step`."""
    _not_copied = (*ExplicitLoop._not_copied, "_fabric", "_stepped")

    def watch(self, fabric: Any, model: nn.Module, *, accumulation_steps: int = 1) -> ESSMonitorCallback:
        """Set what is watched. Call it after `fabric.setup`.

        Args:
            fabric: the loop's `Fabric`; this callback must be among its callbacks.
            model: what `fabric.setup` returned.
            accumulation_steps: what the loop divides the loss by before `fabric.backward`.

        Raises:
            ConfigError: Fabric does not know this callback, or `accumulation_steps` is below 1.
        """
        if not any(callback is self for callback in fabric._callbacks):
            raise ConfigError(
                "fabric: this callback is not among its callbacks, so it would see no optimizer step; "
                "pass it to Fabric(callbacks=[...])"
            )
        if accumulation_steps < 1:
            raise ConfigError(f"accumulation_steps: {accumulation_steps} given; at least 1, the divisor of the loss")
        self._fabric, self._divisor = fabric, accumulation_steps
        # Fabric's wrapper would change the layers' names, so the module inside it is watched.
        wrapper: Any = model
        self._model = wrapper.module if hasattr(wrapper, "_forward_module") else model
        return self

    def start(self) -> None:
        """Build and start the monitor; the with-block does this. A second call does nothing."""
        if not self._is_running:
            self._stepped = ()
        super().start()

    def step(self, metrics: Metrics | None = None, *, step: int | None = None, replay: Replay | None = None) -> None:
        """Pass the metrics of an optimizer step; where none was made since the last call, they are noted.

        Args:
            metrics: as for `Monitor.step`.
            step: optimizer steps so far, where the loop's own count differs from the number of calls.
            replay: as for `Monitor.step`. Without it the model is called again, and its outputs' `loss` used.
        """
        self._require_start("step")
        stepped, self._stepped = self._stepped, ()
        if not stepped:
            self.note(metrics)
        elif self.monitor is not None:
            self.monitor.step(metrics, optimizer=stepped, step=step, replay=replay)

    def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
        """Remember that this optimizer made a step. Fabric calls this by itself."""
        if not any(optimizer is other for other in self._stepped):
            self._stepped = (*self._stepped, optimizer)

    def on_train_start(self) -> None:
        """Start the run, like entering the with-block."""
        self.start()

    def on_train_batch_end(self, outputs: Any = None, batch: Any = None, batch_idx: int | None = None) -> None:
        """Do the same as `step`, with the loss, or a mapping of metrics, as `outputs`."""
        if isinstance(outputs, Mapping):
            self.step(outputs)
        else:
            self.step({"loss": outputs} if isinstance(outputs, torch.Tensor) else None)

    def on_train_end(self) -> None:
        """End the run, like leaving the with-block."""
        self.close("finished")

    def on_exception(self, exception: BaseException | None = None) -> None:
        """End the run as failed, like leaving the with-block by an exception."""
        self.close("failed")

    def _facts(self) -> LoopFacts:
        fabric = self._fabric
        strategy, precision = type(fabric.strategy).__name__, fabric.strategy.precision
        scaler, divisor = getattr(precision, "scaler", None), self._divisor
        return LoopFacts(
            rank=fabric.global_rank,
            local_rank=fabric.local_rank,
            world_size=fabric.world_size,
            strategy=strategy,
            precision=str(precision.precision),
            grad_scale=lambda: loss_factor(scaler, fabric.device, divisor),
            scale_known="DeepSpeed" not in strategy,
            log_folder=log_folder(fabric.loggers) if fabric.is_global_zero else None,
            parallel=sizes_of_mesh(getattr(fabric.strategy, "_device_mesh", None)),
        )

    def _sinks(self) -> list[Exporter]:
        return [*logger_exporters(self._fabric.loggers), *self._table(print)]
