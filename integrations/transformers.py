"""Monitors trainings of the Hugging Face Trainer."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ess_monitor.distributed.parallelism import sizes_of_config
from ess_monitor.errors import ConfigError
from ess_monitor.exporters import Exporter, LoggerExporter, TensorBoardConfig, TensorBoardExporter, WandbExporter
from ess_monitor.integrations.common import CallbackBase, LoopFacts, is_installed, loss_factor, require
from ess_monitor.integrations.json_state import checkpoint_state, from_json
from ess_monitor.integrations.step_loss import StepLoss

require("transformers", extra="transformers")

from transformers.trainer_callback import ExportableState, TrainerCallback  # noqa: E402


class ESSMonitorCallback(CallbackBase, TrainerCallback, ExportableState):
    """Shows the memory utilization of every sequence mixer of a model while a `transformers.Trainer` trains it.

    Pass it to `Trainer(..., callbacks=[ESSMonitorCallback()])`. The diagnosis uses the loss of the sampled step and the
    newest value of everything the Trainer logged, evaluations included (`eval_loss`, ...). The state is saved in
    `trainer_state.json` of every checkpoint and loaded by `trainer.train(resume_from_checkpoint=...)`.

    Of the Trainer's reporters (`report_to`) W&B and MLflow get the readings too. The writer of TensorBoard cannot be
    reached by a callback: another run is written beside the Trainer's.

    The Trainer does not notify its callbacks when training fails. `with callback: trainer.train()` ends the run in the
    exporters at once. Without it the run ends when the callback is discarded, when training starts again, or when the
    program ends.

    Args:
        config: a `MonitorConfig`, or its settings as a dictionary.
        exporters: further sinks: kinds ("prometheus", "event_log"), their settings, or exporter objects.
        table: print the table of layers in the terminal.
        event_log: write the event log to the loop's log folder, for `ess-monitor report`.
        settings: fields of `MonitorConfig`, instead of or on top of `config`.

    Examples:
        >>> from ess_monitor.integrations.transformers import ESSMonitorCallback
        >>> callback = ESSMonitorCallback(every_n_steps=200, exporters=["prometheus"])
        >>> callback.config.every_n_steps
        200
    """

    _logged: dict[str, float]
    """Newest value of everything that was logged."""
    _loss: StepLoss | None = None
    """Collects the loss of the sampled step, while that runs."""
    _shares: _LossShares
    _not_copied = ("_loss", "_shares", "_logged")
    exported_state: dict[str, Any] | None = None
    """Set by the Trainer where it builds its callbacks anew (`restore_callback_states_from_checkpoint`). Not used: the
    Trainer's state holds the same."""

    def __enter__(self) -> ESSMonitorCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the run as failed. After a `trainer.train()` that finished this does nothing."""
        self._drop_loss()
        self._close("failed")

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Build and start the monitor, with the checkpoint's state where training resumes."""
        self.close()
        self._state = self._state_to_resume(state)
        self._logged = {}
        for logs in state.log_history:
            self._logged.update(logs)
        shares = _LossShares(args, kwargs.get("train_dataloader"))
        scaler = getattr(optimizer, "scaler", None)
        deepspeed = getattr(args, "deepspeed", None) is not None
        facts = LoopFacts(
            rank=args.process_index,
            local_rank=args.local_process_index,
            world_size=args.world_size,
            strategy="deepspeed" if deepspeed else str(args.parallel_mode.value),
            precision="bf16" if args.bf16 else "fp16" if args.fp16 else "32",
            grad_scale=lambda: loss_factor(scaler, args.device, shares.micro_batches),
            scale_known=not deepspeed,
            step=state.global_step,
            log_folder=args.output_dir,
            parallel=sizes_of_config(getattr(args, "parallelism_config", None)),
        )
        self._shares = shares
        self._open(model, facts, lambda: [*self._reporters(args), *self._table(_writer(args))])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run as finished."""
        self._drop_loss()
        self._close("finished")

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the epoch's batches from here."""
        self._shares.epoch_begins(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Collect the loss of the step if it is sampled."""
        self._shares.step_begins(state.global_step)
        if self.monitor is None or not self.monitor.armed:
            return
        if self.config.capture.source == "validation":
            self.monitor.disarm()  # the expected evaluation did not happen
            return
        self._loss = StepLoss(model)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Report the optimizer step, with the loss and the logged metrics if it was sampled."""
        if self.monitor is None:
            return
        metrics: dict[str, Any] | None = None
        if self.monitor.armed:
            metrics = dict(self._logged)
            loss = self._drop_loss()
            if loss is not None:
                metrics["loss"] = loss
        self.monitor.step(metrics, optimizer=optimizer, step=state.global_step)
        self._expect_evaluation(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Arm the monitor if an evaluation follows."""
        self._expect_evaluation(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Keep what was logged, an evaluation's metrics included."""
        if self._is_running:
            self._logged.update(logs or {})

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Send the sample of the first evaluation batch to be measured, where evaluations are the source."""
        monitor = self._validation_monitor()
        if monitor is not None and monitor.armed:
            monitor.disarm(self._logged)

    def _reporters(self, args: Any) -> Iterator[Exporter]:
        """Return sinks for those of the Trainer's reporters that a callback can reach."""
        reporters = args.report_to or ()
        run = getattr(sys.modules.get("wandb"), "run", None)
        if "wandb" in reporters and run is not None:
            yield WandbExporter(run, own_rows=True)
        mlflow = sys.modules.get("mlflow")
        if "mlflow" in reporters and mlflow is not None and (run := mlflow.active_run()) is not None:
            # By its id: the Trainer ends the run before the last samples come.
            yield LoggerExporter("mlflow", partial(mlflow.log_metrics, run_id=run.info.run_id))
        is_asked = any(isinstance(config, TensorBoardConfig) for config in self.config.exporters)
        if "tensorboard" in reporters and is_installed("tensorboard") and not is_asked:
            folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or getattr(args, "logging_dir", None)
            beside = TensorBoardConfig(log_dir=Path(folder or Path(args.output_dir, "runs")))
            if not is_installed("PIL"):  # which draws the heat maps, and the Trainer does not need
                beside = beside.model_copy(update={"heatmap_columns": 0})
            yield TensorBoardExporter(beside)

    def _expect_evaluation(self, control: Any) -> None:
        monitor = self._validation_monitor()
        if monitor is not None and control.should_evaluate and monitor.sample_due:
            monitor.arm()

    def _drop_loss(self) -> torch.Tensor | None:
        collected, self._loss = self._loss, None
        return None if collected is None else collected.take()

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes into `trainer_state.json`: settings, and the monitor's state."""
        settings = {"config": self.config.model_dump(mode="json"), "table": self.table, "event_log": self.event_log}
        return {"args": settings, "attributes": {"exported_state": checkpoint_state(self.state_dict)}}

    def _state_to_resume(self, state: Any) -> dict[str, Any] | None:
        name = type(self).__name__
        # A checkpoint may lack this callback's state, and the Trainer looks up the name when it saves.
        stored = state.stateful_callbacks.setdefault(name, self.state())
        if isinstance(stored, list):
            raise ConfigError(f"callbacks: {len(stored)} of {name} given; one watches all layers of the model")
        if state.global_step == 0:
            return None  # training starts anew, and so do the steps
        exported = stored["attributes"].get("exported_state")
        return from_json(exported) if exported else None


class _LossShares:
    """Counts the micro-batches of the current step: the last step of an epoch may have fewer.

    The Trainer weights micro-batches by 1 / their number, or by their share of the step's tokens. The regularizer is a
    mean over sequences and positions, so its weight is 1 / their number in both cases.
    """

    def __init__(self, args: Any, loader: Any) -> None:
        self.micro_batches: int = args.gradient_accumulation_steps
        self._full: int = args.gradient_accumulation_steps
        self._skips_data = not args.ignore_data_skip
        try:
            self._batches: int | None = len(loader)
        except TypeError:  # a stream has no length: every step counts as full
            self._batches = None
        self._first_step: int | None = None

    def epoch_begins(self, step: int) -> None:
        """Note that an epoch begins after `step` optimizer steps; a resumed run may begin within an epoch."""
        resumed = self._first_step is None and self._skips_data
        done = 0 if self._batches is None or not resumed else step % -(-self._batches // self._full)
        self._first_step = step - done

    def step_begins(self, step: int) -> None:
        """Count the micro-batches of the step after `step` optimizer steps."""
        if self._batches is None or self._first_step is None:
            return
        left = self._batches - (step - self._first_step) * self._full
        self.micro_batches = max(1, min(self._full, left))


def _writer(args: Any) -> Any:
    """Return a function that prints the table without breaking the Trainer's progress bar."""
    if args.disable_tqdm:
        return print
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm.write
