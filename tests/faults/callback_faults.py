"""Unusual uses of the callback: fitted twice, pickled, copied."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from typing import Any

import torch
from torch import nn

from tests.faults.harness import Injection, Outcome, backbone, batches, case, hooks_of, loss_of, state_bytes


@case("one callback and one trainer's settings, trainer.fit twice in one process")
def fit_twice(injection: Injection) -> Outcome:
    ess = _callback()
    bare = [_fit(injection, []), _fit(injection, [])]
    first = _fit(injection, [ess])
    sampled = ess.monitor.snapshot().measurements_total["ok"]
    second = _fit(injection, [ess])
    snapshot = ess.monitor.snapshot()
    return Outcome(
        [state_bytes(m) for m in bare] == [state_bytes(m) for m in (first, second)] and not hooks_of(second),
        {
            "both are measured": sampled == 3 and snapshot.measurements_total["ok"] > 0,
            "status finished": snapshot.status == "finished",
        },
    )


@case("the callback and its model are pickled and deep-copied in the middle of a sample")
def callback_copied(injection: Injection) -> Outcome:
    import pytorch_lightning as pl

    copies: list[Any] = []

    class Copying(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2 and ess.monitor.armed:
                copies.extend((copy.deepcopy(ess), pickle.loads(pickle.dumps(ess)), copy.deepcopy(pl_module.model)))

    ess = _callback()
    bare = _fit(injection, [])
    model = _fit(injection, [ess, Copying()])
    settings = [copied.config == ess.config and copied.monitor is None for copied in copies[:2]]
    return Outcome(
        state_bytes(model) == state_bytes(bare),
        {
            "copies have the settings, not the run": settings == [True, True],
            "copies have the state": [copied.state_dict()["step"] for copied in copies[:2]] == [2, 2],
            "all samples ok": ess.monitor.snapshot().measurements_total["ok"] == 3,
        },
    )


def _callback() -> Any:
    from ess_monitor.integrations.lightning import ESSMonitorCallback

    return ESSMonitorCallback(
        every_n_steps=2, overhead_budget_ratio=None, runtime={"queue_length": 64}, table=False, capture={"heads": None}
    )


def _fit(injection: Injection, callbacks: list[Any]) -> nn.Module:
    """Train six steps in Lightning; return the model."""
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = backbone()

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return loss_of(self.model, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=injection.folder,
        )
        trainer.fit(module, torch.utils.data.DataLoader(batches(6), batch_size=None))
    return module.model
