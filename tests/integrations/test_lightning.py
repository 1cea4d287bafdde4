from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ess_monitor import ConfigError, Measurement, MonitorConfig
from ess_monitor.exporters import read_event_log
from ess_monitor.featurizers import Backbone, BackboneConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]

pl = pytest.importorskip("pytorch_lightning")


def callback(**settings: object):
    from ess_monitor.integrations.lightning import ESSMonitorCallback

    # A queue that holds every sample: on a busy machine none may be dropped, where a test counts them.
    eager = {"every_n_steps": 3, "overhead_budget_ratio": None, "runtime": {"queue_length": 64}, "table": False}
    return ESSMonitorCallback(**{**eager, **settings})


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


def measurements(log: Path) -> list[Measurement]:
    return [Measurement.model_validate(e.data) for e in read_event_log(log) if e.event == "measurement"]


@pytest.mark.parametrize("name", ["pytorch_lightning", "lightning.pytorch"])
def test_losses_are_bitwise_equal_with_and_without_the_callback(name: str, tmp_path: Path) -> None:
    framework = importlib.import_module(name)
    bare, watched = make_module(framework), make_module(framework)
    make_trainer(tmp_path, [], framework).fit(bare, loader(), loader(2))
    ess = callback(exporters=[{"kind": "event_log", "path": str(tmp_path / "log.jsonl")}, "prometheus"])
    make_trainer(tmp_path, [ess], framework).fit(watched, loader(), loader(2))
    assert watched.losses == bare.losses
    for a, b in zip(watched.parameters(), bare.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [m.step for m in measurements(tmp_path / "log.jsonl")] == [0, 3, 6, 9]


def test_scalars_go_through_every_logger_of_the_trainer(tmp_path: Path) -> None:
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, csv = TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path, name="csv")
    make_trainer(tmp_path, [callback()], loggers=[board, csv]).fit(make_module(pl), loader())
    events = EventAccumulator(board.log_dir, size_guidance={"scalars": 0})
    events.Reload()
    tag = "ess_utilization_ratio/model.blocks.0.mixer"
    assert [e.step for e in events.Scalars(tag)] == [0, 3, 6, 9]
    assert tag in Path(csv.log_dir, "metrics.csv").read_text().splitlines()[0]


def test_the_step_axis_is_that_of_lightnings_loggers_under_accumulation(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    ess = callback(every_n_steps=2, exporters=[{"kind": "event_log", "path": str(log)}])
    make_trainer(tmp_path, [ess], accumulate_grad_batches=3).fit(make_module(pl), loader(12))
    assert [m.step for m in measurements(log)] == [0, 2]
    assert ess.monitor.snapshot().steps_total == 4


def test_logged_metrics_and_the_loss_reach_the_measurement(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    module = make_module(pl)
    make_trainer(tmp_path, [callback(exporters=[{"kind": "event_log", "path": str(log)}])]).fit(module, loader())
    for m in measurements(log):
        assert m.metrics["loss"] == pytest.approx(module.losses[m.step])
        assert m.metrics["train_loss"] == pytest.approx(module.losses[m.step])


def test_validation_batches_can_be_the_source(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    ess = callback(capture={"source": "validation"}, exporters=[{"kind": "event_log", "path": str(log)}])
    trainer = make_trainer(tmp_path, [ess], val_check_interval=4)
    trainer.fit(make_module(pl), loader(12), loader(2))
    assert [m.step for m in measurements(log)] == [4, 8, 12]


def test_a_checkpoint_carries_the_monitors_state(tmp_path: Path) -> None:
    whole, part, rest = (tmp_path / f"{n}.jsonl" for n in ("whole", "part", "rest"))

    def run(log: Path, epochs: int, resume: Path | None = None):
        ess = callback(exporters=[{"kind": "event_log", "path": str(log)}])
        trainer = make_trainer(tmp_path, [ess], max_epochs=epochs)
        module = make_module(pl)
        trainer.fit(module, loader(10), ckpt_path=resume)
        return trainer, module

    run(whole, 2)
    trainer, _ = run(part, 1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    run(rest, 2, tmp_path / "half.ckpt")
    steps = [m.step for m in measurements(part) + measurements(rest)]
    assert steps == [m.step for m in measurements(whole)] == [0, 3, 6, 9, 12, 15, 18]


def test_the_checkpoint_can_be_loaded_without_unpickling_objects(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [callback()])
    trainer.fit(make_module(pl), loader(4))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["callbacks"]["ess_monitor"]["step"] == 4


def test_an_exception_in_training_closes_the_monitor_as_failed(tmp_path: Path) -> None:
    module = make_module(pl)
    ess = callback()

    def explode(*args: object) -> None:
        raise ZeroDivisionError

    module.validation_step = explode
    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, [ess], num_sanity_val_steps=0).fit(module, loader(4), loader(1))
    assert ess.monitor.snapshot().status == "failed"
    assert sum(len(m._forward_hooks) for m in module.modules()) == 0


def test_fit_twice_goes_on_with_the_same_callback(tmp_path: Path) -> None:
    ess, module = callback(), make_module(pl)
    trainer = make_trainer(tmp_path, [ess])
    trainer.fit(module, loader(6))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(6))
    assert ess.monitor.snapshot().last_step == 12


def test_the_table_is_printed_beside_the_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(tmp_path, [callback(table=True)], enable_progress_bar=True)
    trainer.fit(make_module(pl), loader(6))
    captured = capsys.readouterr()
    assert "model.blocks.1.mixer" in captured.out + captured.err


def test_copies_and_pickles_carry_settings_and_state(tmp_path: Path) -> None:
    ess = callback()
    make_trainer(tmp_path, [ess]).fit(make_module(pl), loader(4))
    for twin in (copy.deepcopy(ess), pickle.loads(pickle.dumps(ess))):
        assert twin.config == ess.config
        assert twin.monitor is None
        assert twin.state_dict()["step"] == 4


def test_settings_win_over_the_config_and_unknown_ones_are_refused() -> None:
    assert callback(config=MonitorConfig(tolerance=0.5), positions=7).config.tolerance == 0.5
    given = MonitorConfig.model_validate({"exporters": ["prometheus", {"kind": "event_log", "path": "x"}]})
    assert callback(config=given).config.exporters == given.exporters
    with pytest.raises(ConfigError, match="evry_n_steps: unknown setting"):
        callback(evry_n_steps=3)


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
    out = subprocess.run(
        [sys.executable, str(script), "--config", "config.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert "CONFIG 7 9 ('blocks.*',)" in out.stdout


class TestAutopilot:
    SETTINGS = {  # noqa: RUF012
        "capture": {"heads": None},
        "diagnosis": {
            "collapsed_below": 0.9,
            "collapsed_recovers_above": 0.95,
            "retention_below": 0.98,
            "retention_recovers_above": 0.99,
            "warmup_steps": 0,
            "patience": 1,
            "metric": "val_accuracy",
            "metric_solved": 0.99,
        },
        "autopilot": {"mode": "auto", "lag_steps": 2, "cooldown_steps": 6, "loss": "loss"},
    }

    def test_a_run_resumed_in_a_new_process_ends_bitwise_as_the_uninterrupted_one(self, tmp_path: Path) -> None:
        script = tmp_path / "run.py"
        script.write_text(RESUME_SCRIPT.format(settings=self.SETTINGS))

        def run(*arguments: str) -> None:
            done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr

        run("24", "whole.ckpt")
        run("8", "part.ckpt")
        run("24", "rest.ckpt", "part.ckpt")
        whole, rest = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.ckpt", "rest.ckpt"))
        assert whole["callbacks"]["ess_monitor"]["autopilot"]["spent"] > 0
        assert (
            rest["callbacks"]["ess_monitor"]["autopilot"]["spent"]
            == whole["callbacks"]["ess_monitor"]["autopilot"]["spent"]
        )
        for name, value in whole["state_dict"].items():
            assert torch.equal(value, rest["state_dict"][name]), name

    def test_advise_changes_no_bit(self, tmp_path: Path) -> None:
        bare, watched = make_module(pl), make_module(pl)
        make_trainer(tmp_path, []).fit(bare, loader())
        settings = {**self.SETTINGS, "autopilot": "advise"}
        ess = callback(**settings)
        make_trainer(tmp_path, [ess]).fit(watched, loader())
        assert watched.losses == bare.losses

    def test_the_gradient_is_scaled_like_the_loss_under_accumulation(self, tmp_path: Path) -> None:
        from ess_monitor.integrations.lightning import _grad_scale

        trainer = make_trainer(tmp_path, [], accumulate_grad_batches=4)
        assert _grad_scale(trainer) == 0.25


RESUME_SCRIPT = """
import sys, warnings, logging
warnings.simplefilter("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader
from ess_monitor.featurizers import Backbone, BackboneConfig
from ess_monitor.integrations.lightning import ESSMonitorCallback

torch.set_num_threads(1)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        options = {{"beta": 1.0}}
        config = BackboneConfig(vocab_size=16, width=16, featurizer="wla", state_size=8, mixer_options=options)
        self.model = Backbone(config)

    def training_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(self.trainer.fit_loop.epoch_loop._batches_that_stepped)
        tokens = torch.randint(0, 16, (4, 40), generator=generator)
        logits = self.model(tokens)
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


steps, target, *resume = sys.argv[1:]
callback = ESSMonitorCallback(every_n_steps=4, overhead_budget_ratio=None, table=False, **{settings})
trainer = pl.Trainer(
    max_epochs=int(steps) // 8, accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False,
    enable_model_summary=False, enable_checkpointing=False, default_root_dir=sys.path[0],
)
data = DataLoader(range(8), batch_size=1)
trainer.fit(Module(), data, ckpt_path=f"{{sys.path[0]}}/{{resume[0]}}" if resume else None)
trainer.save_checkpoint(f"{{sys.path[0]}}/{{target}}")
"""
