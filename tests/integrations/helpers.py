"""One small training, run by each loop that has an integration, so that all can be held to the same contract."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ess_monitor import Measurement
from ess_monitor.exporters import read_event_log
from ess_monitor.featurizers import Backbone, BackboneConfig
from tests.eager import EAGER_DIAGNOSIS, NO_EVIDENCE

EAGER = {
    "capture": {"heads": None},
    "diagnosis": EAGER_DIAGNOSIS,
    "evidence": NO_EVIDENCE,
    "autopilot": {"mode": "auto", "lag_steps": 2, "cooldown_steps": 6, "loss": "loss"},
    "every_n_steps": 4,
}

BATCHES, BATCH = 12, 4


def dataset(batches: int = BATCHES, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 16, (batches * BATCH, length), generator=torch.Generator().manual_seed(3))


class LanguageModel(nn.Module):
    """Next-token prediction that returns its loss, and keeps the losses of training."""

    def __init__(self, featurizer: str = "gla", fail_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"beta": 1.0} if featurizer in ("wla", "gla") else {}
        self.model = Backbone(
            BackboneConfig(vocab_size=16, width=16, featurizer=featurizer, state_size=8, mixer_options=options)
        )
        self.losses: list[float] = []
        self.fail_at = fail_at

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training and len(self.losses) == self.fail_at:
            raise ZeroDivisionError("injected")
        logits = self.model(tokens)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        if self.training:
            self.losses.append(loss.item())
        return {"loss": loss, "logits": logits}


@dataclass
class Run:
    """What a training left behind."""

    model: LanguageModel
    checkpoint: Path
    losses: list[float] = field(default_factory=list)


def settings_of(**settings: Any) -> dict[str, Any]:
    # A queue that holds every sample: on a busy machine none may be dropped, where a test counts them.
    eager = {"every_n_steps": 3, "overhead_budget_ratio": None, "runtime": {"queue_length": 64}, "table": False}
    return {**eager, **settings}


def callback(loop: str, **settings: Any) -> Any:
    module = importlib.import_module(f"ess_monitor.integrations.{loop}")
    return module.ESSMonitorCallback(**settings_of(**settings))


def measurements(log: Path) -> list[Measurement]:
    return [Measurement.model_validate(e.data) for e in read_event_log(log) if e.event == "measurement"]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def scaler() -> torch.amp.GradScaler:
    """A loss scaler that works on the CPU."""
    return torch.amp.GradScaler("cpu", init_scale=1024.0)


def train(
    loop: str,
    folder: Path,
    ess: Any = None,
    steps: int = BATCHES,
    *,
    model: LanguageModel | None = None,
    resume: Path | None = None,
    accumulate: int = 1,
    scaled: bool = False,
) -> Run:
    """`steps` optimizer steps in all, over the data in order, epoch after epoch; a checkpoint is left at the end."""
    model = model or LanguageModel()
    checkpoint = LOOPS[loop](folder, model, ess, steps, resume, accumulate, scaled)
    return Run(model, checkpoint, model.losses)


def _lightning(
    folder: Path, model: LanguageModel, ess: Any, steps: int, resume: Path | None, accumulate: int, scaled: bool
) -> Path:
    import pytorch_lightning as pl
    from pytorch_lightning.plugins.precision import MixedPrecision
    from torch.utils.data import DataLoader

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            self.log("accuracy", 0.1)
            # By the count in the checkpoint: a plain loader begins anew when training resumes within an epoch.
            seen = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
            return self.inner(dataset().split(BATCH)[seen % BATCHES])["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    trainer = pl.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        callbacks=[] if ess is None else [ess],
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accumulate_grad_batches=accumulate,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler())] if scaled else None,
    )
    loader = DataLoader(range(BATCHES), batch_size=1)
    trainer.fit(Module(), loader, ckpt_path=resume, weights_only=resume is not None)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return folder / f"{steps}.ckpt"


def _transformers(
    folder: Path, model: LanguageModel, ess: Any, steps: int, resume: Path | None, accumulate: int, scaled: bool
) -> Path:
    trainer = hf_trainer(folder, model, ess, steps, accumulate)
    if scaled:
        trainer.accelerator.scaler = scaler()
    with ess or contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return folder / f"checkpoint-{steps}"


def hf_trainer(
    folder: Path, model: nn.Module, ess: Any = None, steps: int = BATCHES, accumulate: int = 1, **options: Any
) -> Any:
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    class LoggingTrainer(Trainer):
        def log(self, logs: dict[str, float], *more: Any) -> None:
            super().log({**logs, "accuracy": 0.1}, *more)

    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": steps,
            "save_steps": steps,
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": BATCH,
            "gradient_accumulation_steps": accumulate,
            "learning_rate": 1e-2,
            "train_sampling_strategy": "sequential",
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "max_grad_norm": 0.0,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "remove_unused_columns": False,
            **options,
        }
    )
    rows = [{"tokens": row} for row in dataset()]
    trainer = LoggingTrainer(model, arguments, train_dataset=rows, eval_dataset=rows[: 2 * BATCH])
    trainer.remove_callback(PrinterCallback)
    if ess is not None:
        trainer.add_callback(ess)
    return trainer


def _batches(steps: int, start: int, accumulate: int) -> Iterator[tuple[torch.Tensor, bool]]:
    batches = dataset().split(BATCH)
    for k in range(start * accumulate, steps * accumulate):
        yield batches[k % len(batches)], (k + 1) % accumulate == 0


def _accelerate(
    folder: Path, model: LanguageModel, ess: Any, steps: int, resume: Path | None, accumulate: int, scaled: bool
) -> Path:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    if scaled:
        accelerator.scaler = scaler()
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    if ess is not None:
        ess.watch(accelerator, wrapped)
    start = 0
    if resume is not None:
        accelerator.load_state(str(resume))
        start = int(resume.name)
    with ess or contextlib.nullcontext():
        for tokens, _ in _batches(steps, start, accumulate):
            with accelerator.accumulate(wrapped):
                loss = wrapped(tokens)["loss"]
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                if ess is not None:
                    ess.step({"loss": loss, "accuracy": 0.1}, optimizer=optimizer)
        accelerator.save_state(str(folder / str(steps)))
    return folder / str(steps)


def _fabric(
    folder: Path, model: LanguageModel, ess: Any, steps: int, resume: Path | None, accumulate: int, scaled: bool
) -> Path:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import MixedPrecision

    plugins = [MixedPrecision("16-mixed", "cpu", scaler())] if scaled else None
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[] if ess is None else [ess], plugins=plugins)
    wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    state = {"model": wrapped, "optimizer": optimizer, "step": 0, **({} if ess is None else {"ess_monitor": ess})}
    if ess is not None:
        ess.watch(fabric, wrapped, accumulation_steps=accumulate)
    if resume is not None:
        fabric.load(resume, state, strict=False, weights_only=True)
    with ess or contextlib.nullcontext():
        for tokens, full in _batches(steps, state["step"], accumulate):
            loss = wrapped(tokens)["loss"]
            fabric.backward(loss / accumulate)
            if full:
                optimizer.step()
                optimizer.zero_grad()
            if ess is not None:
                ess.step({"loss": loss, "accuracy": 0.1})
        fabric.save(folder / f"{steps}.ckpt", {**state, "step": steps})
    return folder / f"{steps}.ckpt"


LOOPS: dict[str, Callable[[Path, LanguageModel, Any, int, Path | None, int, bool], Path]] = {
    "lightning": _lightning,
    "transformers": _transformers,
    "accelerate": _accelerate,
    "fabric": _fabric,
}
