from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ess_monitor.exporters import read_event_log
from ess_monitor.featurizers import Backbone, BackboneConfig
from tests.integrations.helpers import callback, measurements
from tests.programs import run_program

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]

pl = pytest.importorskip("pytorch_lightning")


def make_module(framework):
    class Module(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = Backbone(BackboneConfig(vocab_size=16, width=16, featurizer="gla", state_size=8))
            self.losses: list[float] = []

        def training_step(self, batch):
            logits = self.model(batch[0])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[0].roll(-1, 1).flatten())
            self.losses.append(loss.item())
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            logits = self.model(batch[0])
            self.log("val_loss", nn.functional.cross_entropy(logits.flatten(0, 1), batch[0].roll(-1, 1).flatten()))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    return Module()


@pytest.mark.parametrize("given", [{}, {"kv_pairs": 8, "lr": 0.5}])
def test_the_event_log_holds_the_hyperparameters_of_the_module_and_of_the_settings(tmp_path, given):
    module = make_module(pl)
    module.save_hyperparameters(
        {"kv_pairs": 4, "featurizer": "gla", "sizes": [1, 2], "lr": float("inf"), "huge": 2**70}
    )
    log = tmp_path / "events.jsonl"
    watcher = callback(
        "lightning", hyperparameters=given, exporters=[{"kind": "event_log", "path": str(log)}], table=False
    )
    make_trainer(tmp_path, [watcher]).fit(module, loader(2))
    [start, *_] = read_event_log(log)
    assert start.data.hyperparameters == {"kv_pairs": 4, "featurizer": "gla", **given}


def loader(batches: int = 12) -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    return DataLoader(TensorDataset(torch.randint(0, 16, (batches * 4, 24), generator=generator)), batch_size=4)


def make_trainer(folder: Path, callbacks: list, framework=pl, loggers: object = False, **options: object):
    return framework.Trainer(
        **{
            "default_root_dir": folder,
            "max_epochs": 1,
            "logger": loggers,
            "callbacks": callbacks,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 1,
            **options,
        }
    )


@pytest.mark.parametrize("name", ["pytorch_lightning", "lightning.pytorch"])
def test_losses_are_bitwise_equal_with_and_without_the_callback(name: str, tmp_path: Path) -> None:
    framework = importlib.import_module(name)
    bare, watched = make_module(framework), make_module(framework)
    make_trainer(tmp_path, [], framework).fit(bare, loader(), loader(2))
    sinks = [{"kind": "event_log", "path": str(tmp_path / "log.jsonl")}, {"kind": "prometheus", "port": 0}]
    ess = callback("lightning", exporters=sinks)
    make_trainer(tmp_path, [ess], framework).fit(watched, loader(), loader(2))
    assert watched.losses == bare.losses
    for a, b in zip(watched.parameters(), bare.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [m.step for m in measurements(tmp_path / "log.jsonl")] == [0, 3, 6, 9]


def test_scalars_go_through_every_logger_of_the_trainer(tmp_path: Path) -> None:
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, csv = TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path, name="csv")
    make_trainer(tmp_path, [callback("lightning")], loggers=[board, csv]).fit(make_module(pl), loader())
    events = EventAccumulator(board.log_dir, size_guidance={"scalars": 0})
    events.Reload()
    tag = "ess_utilization_ratio/model.blocks.0.mixer"
    assert [e.step for e in events.Scalars(tag)] == [0, 3, 6, 9]
    assert tag in Path(csv.log_dir, "metrics.csv").read_text().splitlines()[0]


def test_logged_metrics_and_the_loss_reach_the_measurement(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    module = make_module(pl)
    ess = callback("lightning", exporters=[{"kind": "event_log", "path": str(log)}])
    make_trainer(tmp_path, [ess]).fit(module, loader())
    for m in measurements(log):
        assert m.metrics["loss"] == pytest.approx(module.losses[m.step])
        assert m.metrics["train_loss"] == pytest.approx(module.losses[m.step])


@pytest.mark.parametrize("backward", [False, True], ids=["loss", "backward"])
def test_a_validation_with_gradients_is_not_taken_for_the_training(backward: bool, tmp_path: Path) -> None:
    """In train mode, as one that computes forces may be; its sequences are shorter than those of the training."""
    log = tmp_path / "log.jsonl"
    module = make_module(pl)

    def validation_step(batch, batch_idx):
        module.train()
        with torch.enable_grad():
            loss = module.model(batch[0][:, :8]).square().mean()
        if backward:
            loss.backward()
            module.zero_grad()

    module.validation_step = validation_step
    ess = callback("lightning", exporters=[{"kind": "event_log", "path": str(log)}])
    trainer = make_trainer(tmp_path, [ess], val_check_interval=1, inference_mode=False)
    trainer.fit(module, loader(5), loader(1))
    assert [{(r.length, r.status) for r in m.readings} for m in measurements(log)] == [{(24, "ok")}] * 2


def test_validation_batches_can_be_the_source(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    ess = callback("lightning", capture={"source": "validation"}, exporters=[{"kind": "event_log", "path": str(log)}])
    trainer = make_trainer(tmp_path, [ess], val_check_interval=4)
    trainer.fit(make_module(pl), loader(12), loader(2))
    assert [m.step for m in measurements(log)] == [4, 8, 12]


def test_the_checkpoint_can_be_loaded_without_unpickling_objects(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [callback("lightning")])
    trainer.fit(make_module(pl), loader(4))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["callbacks"]["ess_monitor"]["step"] == 4


def test_an_exception_in_training_closes_the_monitor_as_failed(tmp_path: Path) -> None:
    module = make_module(pl)
    ess = callback("lightning")

    def explode(*args: object) -> None:
        raise ZeroDivisionError

    module.validation_step = explode
    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, [ess], num_sanity_val_steps=0).fit(module, loader(4), loader(1))
    assert ess.monitor.snapshot().status == "failed"
    assert sum(len(m._forward_hooks) for m in module.modules()) == 0


def test_fit_twice_goes_on_with_the_same_callback(tmp_path: Path) -> None:
    ess, module = callback("lightning"), make_module(pl)
    trainer = make_trainer(tmp_path, [ess])
    trainer.fit(module, loader(6))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(6))
    assert ess.monitor.snapshot().last_step == 12


def test_the_table_is_printed_beside_the_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(tmp_path, [callback("lightning", table=True)], enable_progress_bar=True)
    trainer.fit(make_module(pl), loader(6))
    captured = capsys.readouterr()
    assert "model.blocks.1.mixer" in captured.out + captured.err


def test_lightning_cli_builds_the_callback_from_yaml(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import warnings; warnings.simplefilter('ignore')\n"
        "from pytorch_lightning.cli import LightningCLI\n"
        "from pytorch_lightning.demos.boring_classes import BoringModel\n"
        "cli = LightningCLI(BoringModel, run=False, save_config_callback=None)\n"
        "(ess,) = [c for c in cli.trainer.callbacks if type(c).__name__ == 'ESSMonitorCallback']\n"
        "print('CONFIG', ess.config.every_n_steps, ess.config.diagnosis.patience, ess.config.layers.include)\n"
    )
    (tmp_path / "config.yaml").write_text(
        "trainer:\n"
        "  logger: false\n"
        "  callbacks:\n"
        "    - class_path: ess_monitor.integrations.lightning.ESSMonitorCallback\n"
        "      init_args:\n"
        "        config:\n"
        "          every_n_steps: 7\n"
        "          layers: {include: ['blocks.*']}\n"
        "          diagnosis: {patience: 9}\n"
    )
    out = run_program([script, "--config", "config.yaml"], tmp_path, imports=["pytorch_lightning"], cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert "CONFIG 7 9 ('blocks.*',)" in out.stdout
