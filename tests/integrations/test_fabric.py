"""What is peculiar to loops with Lightning Fabric."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from ess_monitor import ConfigError
from tests.integrations.helpers import LanguageModel, callback, dataset, measurements, train

pytest.importorskip("lightning_fabric")
pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*")


def set_up(ess, framework: str = "lightning_fabric", **options: object):
    fabric = importlib.import_module(framework).Fabric(accelerator="cpu", devices=1, callbacks=[ess], **options)
    model = LanguageModel()
    return fabric, *fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


def logged(folder: Path, **settings: object):
    log = folder / "log.jsonl"
    return log, callback("fabric", exporters=[{"kind": "event_log", "path": str(log)}], **settings)


@pytest.mark.parametrize("framework", ["lightning_fabric", "lightning.fabric"])
def test_hooks_do_what_the_with_block_and_step_do(framework: str, tmp_path: Path) -> None:
    log, ess = logged(tmp_path)
    fabric, model, optimizer = set_up(ess, framework)
    ess.watch(fabric, model)
    fabric.call("on_train_start")
    for k, tokens in enumerate(dataset().split(4)):
        loss = model(tokens)["loss"]
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        fabric.call("on_train_batch_end", loss if k % 2 else {"loss": loss, "k": k}, tokens, k)
    fabric.call("on_train_end")
    losses = train("fabric", tmp_path / "bare").losses
    assert {m.step: m.metrics["loss"] for m in measurements(log)} == pytest.approx({k: losses[k] for k in (0, 3, 6, 9)})
    assert measurements(log)[2].metrics["k"] == 6
    assert ess.monitor.snapshot().status == "finished"


def test_the_hook_for_exceptions_closes_the_run_as_failed() -> None:
    ess = callback("fabric")
    fabric, model, _ = set_up(ess)
    ess.watch(fabric, model)
    fabric.call("on_train_start")
    fabric.call("on_exception", ZeroDivisionError())
    assert ess.monitor.snapshot().status == "failed"


def test_readings_go_through_every_logger(tmp_path: Path) -> None:
    from lightning_fabric.loggers import CSVLogger, TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, csv = TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path, name="csv")
    ess = callback("fabric")
    fabric, model, optimizer = set_up(ess, loggers=[board, csv])
    with ess.watch(fabric, model):
        for tokens in dataset().split(4):
            fabric.backward(model(tokens)["loss"])
            optimizer.step()
            optimizer.zero_grad()
            ess.step()
    for logger in (board, csv):
        logger.finalize("success")
    tag = "ess_utilization_ratio/model.blocks.0.mixer"
    events = EventAccumulator(board.log_dir, size_guidance={"scalars": 0})
    events.Reload()
    assert [e.step for e in events.Scalars(tag)] == [0, 3, 6, 9]
    assert tag in Path(csv.log_dir, "metrics.csv").read_text().splitlines()[0]


def test_a_step_with_two_optimizers_is_one_step() -> None:
    ess = callback("fabric")
    fabric, model, optimizer = set_up(ess)
    second = fabric.setup_optimizers(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))
    with ess.watch(fabric, model):
        fabric.backward(model(dataset()[:4])["loss"])
        optimizer.step()
        second.step()
        ess.step()
        ess.step()  # no optimizer step since
        assert ess.monitor._optimizer == (optimizer.optimizer, second.optimizer)
    assert ess.monitor.snapshot().last_step == 1


def test_a_callback_that_fabric_does_not_know_is_refused() -> None:
    fabric, model, _ = set_up(callback("fabric"))
    with pytest.raises(ConfigError, match=r"pass it to Fabric\(callbacks="):
        callback("fabric").watch(fabric, model)


def test_a_divisor_below_1_is_refused() -> None:
    ess = callback("fabric")
    fabric, model, _ = set_up(ess)
    with pytest.raises(ConfigError, match="accumulation_steps: 0 given"):
        ess.watch(fabric, model, accumulation_steps=0)
