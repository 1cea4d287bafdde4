"""A metric of an evaluation counts once per evaluation, however often the loop repeats it between two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ess_monitor import Monitor, MonitorConfig
from tests.integrations.helpers import LanguageModel, callback, dataset, hf_trainer, settings_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning_fabric"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]

STEPS, EPOCH = 16, 5
ACCURACIES = (0.125, 0.25, 0.5)
"""Of the evaluations after steps 5, 10 and 15; samples are taken in steps 1, 4, 7, 10, 13 and 16."""
SEEN_FROM = (6, 12, 15)
"""First sample after each evaluation, by the steps before it."""


def settings(metric: str) -> dict[str, Any]:
    return settings_of(diagnosis={"metric": metric, "metric_solved": 0.9})


def rows(steps: int = STEPS) -> torch.Tensor:
    return torch.cat([dataset(), dataset()])[: 4 * steps]


def model_and_optimizer() -> tuple[LanguageModel, torch.optim.Optimizer]:
    model = LanguageModel()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def _lightning(folder: Path, accuracies: Iterator[float]) -> Monitor:
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = LanguageModel()

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            self.log("train_accuracy", 0.75, on_epoch=True)
            return self.inner(batch)["loss"]

        def validation_step(self, batch: torch.Tensor) -> None: ...

        def on_validation_epoch_end(self) -> None:
            self.log("accuracy", next(accuracies))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    ess = callback("lightning", **settings("accuracy"))
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_steps=STEPS,
        max_epochs=-1,
        limit_train_batches=EPOCH,
        logger=False,
        callbacks=[ess],
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Module(), *(torch.utils.data.DataLoader(rows(n), batch_size=4) for n in (STEPS, 1)))
    return ess.monitor


def _transformers(folder: Path, accuracies: Iterator[float]) -> Monitor:
    ess = callback("transformers", **settings("eval_accuracy"))
    evaluations = {"eval_strategy": "steps", "eval_steps": EPOCH, "label_names": ["tokens"], "save_strategy": "no"}
    trainer = hf_trainer(folder, LanguageModel(), ess, STEPS, **evaluations)
    trainer.compute_metrics = lambda predictions: {"accuracy": next(accuracies, 0.75)}
    with ess:
        trainer.train()
    return ess.monitor


def _accelerate(folder: Path, accuracies: Iterator[float]) -> Monitor:
    """Passes an evaluation's metric with the step that it follows, and no more."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*model_and_optimizer())
    with callback("accelerate", **settings("accuracy")).watch(accelerator, model) as ess:
        for step, tokens in enumerate(rows().split(4), 1):
            accelerator.backward(model(tokens)["loss"])
            optimizer.step()
            optimizer.zero_grad()
            ess.step({"accuracy": next(accuracies)} if step % EPOCH == 0 else {"lr": 0.01}, optimizer=optimizer)
    return ess.monitor


def _fabric(folder: Path, accuracies: Iterator[float]) -> Monitor:
    """Passes an evaluation's metric by a call of its own."""
    from lightning_fabric import Fabric

    ess = callback("fabric", **settings("accuracy"))
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[ess])
    model, optimizer = fabric.setup(*model_and_optimizer())
    with ess.watch(fabric, model):
        for step, tokens in enumerate(rows().split(4), 1):
            fabric.backward(model(tokens)["loss"])
            optimizer.step()
            optimizer.zero_grad()
            ess.step({"lr": 0.01})
            if step % EPOCH == 0:
                ess.step({"accuracy": next(accuracies)})
    return ess.monitor


def _plain(folder: Path, accuracies: Iterator[float]) -> Monitor:
    """Repeats the last value at every step."""
    model, optimizer = model_and_optimizer()
    given = {name: value for name, value in settings("accuracy").items() if name != "table"}
    accuracy = None
    with Monitor(model, MonitorConfig.load(environment=False, **given)) as monitor:
        for step, tokens in enumerate(rows().split(4), 1):
            model(tokens)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step({"accuracy": accuracy})
            if step % EPOCH == 0:
                accuracy = next(accuracies)
    return monitor


LOOPS: dict[str, Callable[[Path, Iterator[float]], Monitor]] = {
    "accelerate": _accelerate,
    "fabric": _fabric,
    "lightning": _lightning,
    "plain": _plain,
    "transformers": _transformers,
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_metric_that_is_logged_once_an_epoch_counts_when_it_is_new(loop: str, tmp_path: Path) -> None:
    monitor = LOOPS[loop](tmp_path, iter(ACCURACIES))
    task = monitor.state_dict()["diagnosis"]["task"]
    assert [value for _, value in task["new"]] == pytest.approx(ACCURACIES)
    # The measurements between two new values: samples are 3 steps apart.
    first = 9 if loop == "accelerate" else SEEN_FROM[1]  # there it comes with step 10 itself, which is sampled
    seen = (SEEN_FROM[0], first, SEEN_FROM[2])
    assert [gap for gap, _ in task["new"]] == [seen[0] // 3 + 1, (seen[1] - seen[0]) // 3, (seen[2] - seen[1]) // 3]
