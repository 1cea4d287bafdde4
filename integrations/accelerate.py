"""Monitors training loops that use Hugging Face accelerate."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ess_monitor.distributed.parallelism import sizes_of_config
from ess_monitor.errors import CheckpointError, format_error
from ess_monitor.evidence.counterfactual import Replay
from ess_monitor.exporters import Exporter, LoggerExporter, TensorBoardExporter, WandbExporter
from ess_monitor.integrations.common import ExplicitLoop, LoopFacts, loss_factor, require
from ess_monitor.integrations.json_state import checkpoint_state, from_json
from ess_monitor.interventions.alpha import Optimizers
from ess_monitor.pipeline.context import Metrics
from ess_monitor.runtime.files import replace_file

require("accelerate", extra="accelerate")

_HIDES_LOSS_SCALE = ("DEEPSPEED", "MEGATRON_LM")
_WATCHING: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""How many callbacks write into the checkpoints of an accelerator."""


class ESSMonitorCallback(ExplicitLoop):
    """Shows the memory utilization of every sequence mixer while a loop with an `Accelerator` trains.

    `watch` names the accelerator and the model. From then on `accelerator.save_state` writes `ess_monitor.json` beside
    its own files, and `load_state` reads it where there is one. The with-block is the run; `step` goes right after
    `optimizer.step()`. Readings go through every tracker of the accelerator.

    Args:
        config: a `MonitorConfig`, or its settings as a dictionary.
        exporters: further sinks: kinds ("prometheus", "event_log"), their settings, or exporter objects.
        table: print the table of layers in the terminal.
        event_log: write the event log to the loop's log folder, for `ess-monitor report`.
        settings: fields of `MonitorConfig`, instead of or on top of `config`.

    Examples:
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
    _leave_checkpoints: Callable[[], None] | None = None
    """Ends what `watch` began with its accelerator."""
    _not_copied = (*ExplicitLoop._not_copied, "_accelerator", "_leave_checkpoints")

    def watch(self, accelerator: Any, model: nn.Module) -> ESSMonitorCallback:
        """Set what is watched. Call it after `accelerator.prepare` and before `accelerator.load_state`.

        Args:
            accelerator: the loop's `Accelerator`.
            model: what `prepare` returned.
        """
        if self._accelerator is not accelerator:
            self._join_checkpoints(accelerator)
        self._accelerator, self._model = accelerator, model
        return self

    def _join_checkpoints(self, accelerator: Any) -> None:
        """Write the state into the accelerator's checkpoints, and read it where there is one.

        An object that is registered for checkpointing has to be in every checkpoint that is loaded, and in no other.
        """
        if self._leave_checkpoints is not None:
            self._leave_checkpoints()
        number = _WATCHING.get(accelerator, 0)
        _WATCHING[accelerator] = number + 1
        name = f"ess_monitor_{number}.json" if number else "ess_monitor.json"  # as accelerate names its own

        def save(models: Any, weights: Any, folder: str) -> None:
            state = checkpoint_state(self.state_dict)
            everywhere = accelerator.project_configuration.save_on_each_node
            if accelerator.is_local_main_process if everywhere else accelerator.is_main_process:
                replace_file(Path(folder, name), json.dumps(state or {}).encode())

        def load(models: Any, folder: str) -> None:
            path = Path(folder, name)
            self.load_state_dict(_read(path) if path.exists() else {})

        saving = accelerator.register_save_state_pre_hook(save)
        loading = accelerator.register_load_state_pre_hook(load)

        def leave() -> None:
            saving.remove()
            loading.remove()

        self._leave_checkpoints = leave

    def step(
        self,
        metrics: Metrics | None = None,
        *,
        optimizer: Optimizers = None,
        step: int | None = None,
        replay: Replay | None = None,
    ) -> None:
        """Tell the monitor that `optimizer.step()` was called; while gradients accumulate only the metrics are noted.

        Args:
            metrics: as for `Monitor.step`.
            optimizer: as for `Monitor.step`.
            step: optimizer steps so far, where the loop's own count differs from the number of calls.
            replay: as for `Monitor.step`. Without it the prepared model is called again, and its outputs' `loss` used.
        """
        self._require_start("step")
        if self.monitor is None:
            return
        if not self._accelerator.sync_gradients:
            self.note(metrics)
        else:
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
            log_folder=accelerator.logging_dir or accelerator.project_dir,
            parallel=sizes_of_config(getattr(accelerator, "parallelism_config", None)),
        )

    def _sinks(self) -> list[Exporter]:
        sinks: list[Exporter] = []
        for tracker in self._accelerator.trackers:
            kinds = {cls.__name__ for cls in type(tracker).__mro__}  # a tracker of one's own may have any name
            if tracker.name == "tensorboard":
                sinks.append(TensorBoardExporter(writer=tracker.tracker))
            elif "WandBTracker" in kinds:
                sinks.append(WandbExporter(tracker.tracker))
            elif "MLflowTracker" in kinds:  # by its id: what comes after the run's end would begin another run
                log = partial(tracker.log, run_id=tracker.tracker.info.run_id)
                sinks.append(LoggerExporter("mlflow", log))
            else:
                sinks.append(LoggerExporter(tracker.name, tracker.log))
        return [*sinks, *self._table(print)]


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({format_error(error):.200}); delete it to resume without the monitor's state"
        ) from None
    return state
