"""Monitors training loops that use Hugging Face accelerate."""

from __future__ import annotations

from typing import Any

from torch import nn

from ess_monitor.distributed.parallelism import sizes_of_config
from ess_monitor.evidence.counterfactual import Replay
from ess_monitor.exporters import Exporter, TensorBoardExporter
from ess_monitor.exporters.framework_logger import LoggerExporter
from ess_monitor.integrations.common import ExplicitLoop, LoopFacts, loss_factor, require
from ess_monitor.interventions.alpha import Optimizers
from ess_monitor.pipeline.context import Metrics

require("accelerate", extra="accelerate")

_HIDES_LOSS_SCALE = ("DEEPSPEED", "MEGATRON_LM")


class ESSMonitorCallback(ExplicitLoop):
    """Shows the memory utilization of every sequence mixer while a loop with an `Accelerator` trains.

    `watch` names the accelerator and the model, and registers the callback for `accelerator.save_state` and
    `load_state`; the with-block is the run; `step` goes right after `optimizer.step()`. Readings go through every
    tracker of the accelerator.

    Args:
        config: a `MonitorConfig`, or its settings as a dictionary.
        exporters: further sinks: kinds ("prometheus", "event_log"), their settings, or exporter objects.
        table: print the table of layers in the terminal.
        settings: fields of `MonitorConfig`, instead of or on top of `config`.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from ess_monitor.featurizers import GLA
        >>> from ess_monitor.integrations.accelerate import ESSMonitorCallback
        >>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        >>> model = GLA(16, 2)
        >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> with ESSMonitorCallback(every_n_steps=2, table=False).watch(accelerator, model) as ess:
        ...     for _ in range(8):
        ...         with accelerator.accumulate(model):
        ...             loss = model(torch.randn(4, 32, 16)).square().mean()
        ...             accelerator.backward(loss)
        ...             optimizer.step()
        ...             optimizer.zero_grad()
        ...             ess.step({"loss": loss}, optimizer=optimizer)
        >>> {reading.status for reading in ess.monitor.readings}
        {'ok'}
    """

    _accelerator: Any = None
    _not_copied = ("_accelerator", "_model")

    def watch(self, accelerator: Any, model: nn.Module) -> ESSMonitorCallback:
        """Set what is watched. Call it after `accelerator.prepare` and before `accelerator.load_state`.

        Args:
            accelerator: the loop's `Accelerator`.
            model: what `prepare` returned.
        """
        if self._accelerator is not accelerator:
            accelerator.register_for_checkpointing(self)
        self._accelerator, self._model = accelerator, model
        return self

    def step(
        self,
        metrics: Metrics | None = None,
        *,
        optimizer: Optimizers = None,
        step: int | None = None,
        replay: Replay | None = None,
    ) -> None:
        """Tell the monitor that `optimizer.step()` was called; while gradients accumulate this does nothing.

        Args:
            metrics: numbers or tensors of one element; tensors are not waited for.
            optimizer: as for `Monitor.step`.
            step: optimizer steps so far, where the loop's own count differs from the number of calls.
            replay: as for `Monitor.step`. Without it the prepared model is called again, and its outputs' `loss` used.
        """
        if self.monitor is not None and self._accelerator.sync_gradients:
            self.monitor.step(metrics, optimizer=optimizer, step=step, replay=replay)

    def _facts(self) -> LoopFacts:
        accelerator = self._accelerator
        kind = accelerator.distributed_type.value
        return LoopFacts(
            rank=accelerator.process_index,
            local_rank=accelerator.local_process_index,
            world_size=accelerator.num_processes,
            strategy=str(kind),
            precision=str(accelerator.mixed_precision),
            grad_scale=lambda: loss_factor(
                accelerator.scaler, accelerator.device, accelerator.gradient_accumulation_steps
            ),
            scale_known=kind not in _HIDES_LOSS_SCALE,
            parallel=sizes_of_config(getattr(accelerator, "parallelism_config", None)),
        )

    def _sinks(self) -> list[Exporter]:
        sinks: list[Exporter] = []
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                sinks.append(TensorBoardExporter(writer=tracker.tracker))
            else:
                sinks.append(LoggerExporter(tracker.name, tracker.log))
        return [*sinks, *self._table(print)]
