"""The callback for the Hugging Face Trainer."""

from __future__ import annotations

import json
import logging
from types import TracebackType
from typing import Any

import torch

from ess_monitor.distributed.parallelism import sizes_of_config
from ess_monitor.errors import ConfigError
from ess_monitor.integrations.common import CallbackBase, LoopFacts, loss_factor, require
from ess_monitor.integrations.json_state import from_json, to_json
from ess_monitor.integrations.step_loss import StepLoss

require("transformers", extra="transformers")

from transformers.trainer_callback import ExportableState, TrainerCallback  # noqa: E402

_LOG = logging.getLogger(__name__)


class ESSMonitorCallback(CallbackBase, TrainerCallback, ExportableState):
    """Shows the memory utilization of every sequence mixer of a model while a `transformers.Trainer` trains it.

    `Trainer(..., callbacks=[ESSMonitorCallback()])` is all. The diagnosis sees the loss of the sampled step and the
    newest value of everything the Trainer logged, evaluation included (`eval_loss`, ...). The state is kept in
    `trainer_state.json` of every checkpoint and taken up by `trainer.train(resume_from_checkpoint=...)`.

    The Trainer tells its callbacks nothing when training fails. `with callback: trainer.train()` ends the run in the
    exporters at once; without it that happens when the callback is discarded, when training starts again, or when the
    program ends.

    Args:
        config: a `MonitorConfig`, or its settings as a dictionary.
        exporters: further sinks: kinds ("tensorboard", "prometheus"), their settings, or exporter objects. The
            Trainer's own reporters cannot be reached by a callback.
        table: print the table of layers in the terminal.
        settings: fields of `MonitorConfig`, instead of or on top of `config`.

    Example:
        >>> from ess_monitor.integrations.transformers import ESSMonitorCallback
        >>> callback = ESSMonitorCallback(every_n_steps=200, exporters=["prometheus"])
        >>> callback.config.every_n_steps
        200
    """

    _logged: dict[str, float]
    """Newest value of everything that was logged."""
    _loss: StepLoss | None = None
    """Of the sampled step, while it runs."""
    _shares: _LossShares
    exported_state: dict[str, Any] | None = None
    """Set by the Trainer where it builds its callbacks anew (`restore_callback_states_from_checkpoint`). Not read: the
    Trainer's state holds the same."""

    # -- life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> ESSMonitorCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End a run that failed. After `trainer.train()` came to its end this does nothing."""
        self._drop_loss()
        self._close("failed")

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Build and start the monitor, from the checkpoint's state where training resumes."""
        self.close()
        self._state = self._resumed(state)
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
            parallel=sizes_of_config(getattr(args, "parallelism_config", None)),
        )
        self._shares = shares
        self._open(model, facts, lambda: self._table(_writer(args)))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The run came to its end."""
        self._drop_loss()
        self._close("finished")

    # -- steps --------------------------------------------------------------------------------------------------------

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Batches are counted from here."""
        self._shares.epoch_begins(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look at the loss of the step that is sampled."""
        self._shares.step_begins(state.global_step)
        if self.monitor is None or not self.monitor.armed:
            return
        if self.config.capture.source == "validation":
            self.monitor.disarm()  # the evaluation that was announced did not come
            return
        self._loss = StepLoss(model)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """An optimizer step is done."""
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
        """An evaluation may follow."""
        self._expect_evaluation(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Remember what was logged, an evaluation's metrics among it."""
        if self._running:
            self._logged.update(logs or {})

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand over what the first evaluation batch gave, when that is where samples come from."""
        if self._samples_validation() and self.monitor.armed:  # type: ignore[union-attr]
            self.monitor.disarm(self._logged)  # type: ignore[union-attr]

    def _expect_evaluation(self, control: Any) -> None:
        if control.should_evaluate and self._samples_validation() and self.monitor.sample_due:  # type: ignore[union-attr]
            self.monitor.arm()  # type: ignore[union-attr]

    def _samples_validation(self) -> bool:
        return self.monitor is not None and self.config.capture.source == "validation"

    def _drop_loss(self) -> torch.Tensor | None:
        watched, self._loss = self._loss, None
        return None if watched is None else watched.take()

    # -- state --------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into `trainer_state.json`: settings, and the monitor's state."""
        settings = {"config": self.config.model_dump(mode="json"), "table": self.table}
        try:
            exported = to_json(self.state_dict())
            json.dumps(exported)
        except Exception as error:  # a checkpoint must be written whatever happens here
            _LOG.warning("the monitor's state is not in this checkpoint: %s: %s", type(error).__name__, error)
            exported = None
        return {"args": settings, "attributes": {"exported_state": exported}}

    def _resumed(self, state: Any) -> dict[str, Any] | None:
        name = type(self).__name__
        # A checkpoint that was written without this callback: the Trainer looks the name up when it saves.
        stored = state.stateful_callbacks.setdefault(name, self.state())
        if isinstance(stored, list):
            raise ConfigError(f"callbacks: {len(stored)} of {name} given; one watches all layers of the model")
        if state.global_step == 0:
            return None  # training begins anew, and its steps are counted anew
        exported = stored["attributes"].get("exported_state")
        return from_json(exported) if exported else None

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to the training that runs."""
        mine = super().__getstate__()
        return {name: value for name, value in mine.items() if name not in ("_loss", "_shares", "_logged")}


class _LossShares:
    """Into how many micro-batches the step under way is divided: the last one of an epoch may have fewer.

    The Trainer weights micro-batches by 1 / their number, or by their share of the step's tokens. The regularizer is a
    mean over sequences and positions, so 1 / their number is its weight in both.
    """

    def __init__(self, args: Any, loader: Any) -> None:
        self.micro_batches: int = args.gradient_accumulation_steps
        self._full: int = args.gradient_accumulation_steps
        self._skips_data = not args.ignore_data_skip
        try:
            self._batches: int | None = len(loader)
        except TypeError:  # a stream: every step is taken for a full one
            self._batches = None
        self._first_step: int | None = None

    def epoch_begins(self, step: int) -> None:
        """An epoch begins after `step` optimizer steps; the first one of a resumed run perhaps in its middle."""
        resumed = self._first_step is None and self._skips_data
        done = 0 if self._batches is None or not resumed else step % -(-self._batches // self._full)
        self._first_step = step - done

    def step_begins(self, step: int) -> None:
        """A step begins after `step` optimizer steps."""
        if self._batches is None or self._first_step is None:
            return
        left = self._batches - (step - self._first_step) * self._full
        self.micro_batches = max(1, min(self._full, left))


def _writer(args: Any) -> Any:
    """Where the table goes: past the Trainer's progress bar."""
    if args.disable_tqdm:
        return print
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm.write
