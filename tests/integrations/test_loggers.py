"""Every logger gets every measurement, in every loop, and loses nothing that the loop itself logs."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ess_monitor import Measurement, Monitor, MonitorConfig
from ess_monitor.exporters import LoggerExporter, TensorBoardExporter, WandbExporter, scalars
from tests.exporters.helpers import measurement, run_info, snapshot
from tests.integrations.helpers import BATCHES, LanguageModel, callback, dataset, hf_trainer, settings_of
from tests.integrations.logs import READERS, wandb_step_metrics

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning_fabric"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]


@dataclass
class Kept:
    """An exporter that keeps what it gets."""

    name = "kept"
    inline = True
    measurements: list[Measurement] = field(default_factory=list)

    def start(self, run: Any, snapshot: Any) -> None: ...

    def export(self, measurement: Measurement) -> None:
        self.measurements.append(measurement)

    def close(self, status: str) -> None: ...


class CSVFile:
    """Rows in one file with a header, as a loop of one's own may write them."""

    def __init__(self, folder: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self.path = folder / "metrics.csv"

    def log(self, values: dict[str, float], step: int) -> None:
        self.rows.append({"step": step, **values})

    def save(self) -> None:
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, sorted({tag for row in self.rows for tag in row}))
            writer.writeheader()
            writer.writerows(self.rows)


def _mlflow_uri(folder: Path) -> str:
    return (folder / "mlflow").as_uri()


def wandb_run(folder: Path) -> Any:
    import wandb

    return wandb.init(project="test", dir=folder / "wandb")


def _lightning_loggers(package: str, folder: Path) -> list[Any]:
    loggers = importlib.import_module("pytorch_lightning.loggers")
    own = importlib.import_module(f"{package}.loggers")  # Fabric brings two of its own, and takes the others
    return [
        own.TensorBoardLogger(folder / "tensorboard"),
        own.CSVLogger(folder / "csv"),
        loggers.WandbLogger(save_dir=folder / "wandb", offline=True, project="test"),
        loggers.MLFlowLogger(tracking_uri=_mlflow_uri(folder)),
    ]


def _lightning(folder: Path, kept: Kept) -> str:
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = LanguageModel()

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            loss = self.inner(batch)["loss"]
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    trainer = pl.Trainer(
        default_root_dir=folder,
        max_epochs=1,
        logger=_lightning_loggers("pytorch_lightning", folder),
        callbacks=[callback("lightning", exporters=[kept])],
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(dataset(), batch_size=4))
    return "loss"


def _transformers(folder: Path, kept: Kept) -> str:
    ess = callback("transformers", exporters=[kept])
    reporters = ["tensorboard", "wandb", "mlflow"]
    with ess, wandb_run(folder):
        hf_trainer(folder, LanguageModel(), ess, report_to=reporters, save_strategy="no").train()
    return "loss"


def _fabric(folder: Path, kept: Kept) -> str:
    from lightning_fabric import Fabric

    ess = callback("fabric", exporters=[kept])
    loggers = _lightning_loggers("lightning_fabric", folder)
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[ess], loggers=loggers)
    model, optimizer = fabric.setup(*_model_and_optimizer())
    with ess.watch(fabric, model):
        for step, tokens in enumerate(dataset().split(4)):
            loss = model(tokens)["loss"]
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            fabric.log("loss", loss, step=step)
            ess.step({"loss": loss})
    return "loss"


def _accelerate(folder: Path, kept: Kept) -> str:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    class CSVTracker(GeneralTracker):
        name, requires_logging_directory, tracker = "csv", False, CSVFile(folder / "csv")

        def store_init_configuration(self, values: dict[str, Any]) -> None: ...

        def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
            self.tracker.log(values, step)

        def finish(self) -> None:
            self.tracker.save()

    trackers = ["tensorboard", "wandb", "mlflow", CSVTracker()]
    accelerator = Accelerator(cpu=True, log_with=trackers, project_dir=folder / "tensorboard")
    accelerator.init_trackers("test", init_kwargs={"wandb": {"dir": folder / "wandb"}})
    model, optimizer = accelerator.prepare(*_model_and_optimizer())
    with callback("accelerate", exporters=[kept]).watch(accelerator, model) as ess:
        for step, tokens in enumerate(dataset().split(4)):
            loss = model(tokens)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            ess.step({"loss": loss})
            accelerator.log({"loss": loss.item()}, step=step)
    accelerator.end_training()
    return "loss"


def _plain(folder: Path, kept: Kept) -> str:
    import mlflow
    from torch.utils.tensorboard import SummaryWriter

    model, optimizer = _model_and_optimizer()
    rows, writer = CSVFile(folder / "csv"), SummaryWriter(folder / "tensorboard")
    with mlflow.start_run(), wandb_run(folder) as run:
        sinks = [
            kept,
            LoggerExporter("csv", rows.log, flush=rows.save),
            LoggerExporter("mlflow", mlflow.log_metrics),
            TensorBoardExporter(writer=writer),
            WandbExporter(run),
        ]
        settings = {name: value for name, value in settings_of().items() if name != "table"}
        with Monitor(model, MonitorConfig.load(environment=False, **settings), exporters=sinks) as monitor:
            for step, tokens in enumerate(dataset().split(4)):
                loss = model(tokens)["loss"]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                run.log({"loss": loss.item()}, step=step)
                mlflow.log_metrics({"loss": loss.item()}, step=step)
                rows.log({"loss": loss.item()}, step)
                writer.add_scalar("loss", loss.item(), step)
                monitor.step({"loss": loss})
    writer.close()
    return "loss"


def _model_and_optimizer() -> tuple[LanguageModel, torch.optim.Optimizer]:
    model = LanguageModel()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


LOOPS: dict[str, Callable[[Path, Kept], str]] = {
    "accelerate": _accelerate,
    "fabric": _fabric,
    "lightning": _lightning,
    "plain": _plain,
    "transformers": _transformers,
}
PAIRS = [(loop, logger) for loop in LOOPS for logger in READERS if (loop, logger) != ("transformers", "csv")]


@pytest.fixture(scope="module", autouse=True)
def _offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_CONSOLE", "off")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield
        import wandb

        wandb.teardown()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[Measurement], str]]:
    """Each loop trains once, with all loggers: the folder, the measurements, and the loop's own tag."""

    @cache
    def fit(loop: str) -> tuple[Path, list[Measurement], str]:
        import mlflow
        import wandb

        folder, kept = tmp_path_factory.mktemp(loop), Kept()
        with pytest.MonkeyPatch.context() as patch:
            (folder / "wandb").mkdir()
            mlflow.set_tracking_uri(_mlflow_uri(folder))
            patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
            tag = LOOPS[loop](folder, kept)
            if wandb.run is not None:
                wandb.finish()
        return folder, kept.measurements, tag

    return fit


@pytest.mark.parametrize(("loop", "logger"), PAIRS)
def test_every_measurement_and_all_that_the_loop_logs_can_be_read_back(
    loop: str, logger: str, written: Callable[[str], tuple[Path, list[Measurement], str]]
) -> None:
    folder, measurements, tag_of_loop = written(loop)
    assert [m.step for m in measurements] == [0, 3, 6, 9]
    found = READERS[logger](folder / logger)
    for tag in scalars(measurements[0]):
        expected = [(m.step, scalars(m)[tag]) for m in measurements if tag in scalars(m)]
        assert [step for step, _ in found[tag]] == [step for step, _ in expected], tag
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in expected], rel=1e-6)
    (own,) = [series for tag, series in found.items() if tag in (tag_of_loop, f"train/{tag_of_loop}")]
    assert len(own) == BATCHES
    assert len({step for step, _ in own}) == BATCHES


@pytest.mark.parametrize("loop", sorted(LOOPS))
def test_each_chart_in_wandb_has_the_steps_of_the_samples(
    loop: str, written: Callable[[str], tuple[Path, list[Measurement], str]]
) -> None:
    folder, measurements, _ = written(loop)
    defined = wandb_step_metrics(folder / "wandb")
    assert {defined.get(tag) for m in measurements for tag in scalars(m)} == {"ess_monitor/step"}


STEPS = 40
ROWS_OF_A_LOOP: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "every step": lambda k: [{"step": k}],
    "twice at every step": lambda k: [{"step": k}, {"step": k}],
    "one step ahead": lambda k: [{"step": k + 1}],
    "tokens": lambda k: [{"step": 4096 * k}],
    "every 20 steps": lambda k: [{"step": k}] if k % 20 == 0 else [],
    "epochs of 10 steps": lambda k: [{"step": k // 10}] if k % 10 == 9 else [],
    "a count of its own, then slower": lambda k: [{"step": k}] if k < 10 else [{"step": k // 10 + 9}] * (k % 10 == 0),
    "no step": lambda k: [{}],
    "no step, once an epoch": lambda k: [{}] if k % 10 == 9 else [],
    "nothing is logged": lambda k: [],
}


@pytest.mark.parametrize("rows", ROWS_OF_A_LOOP)
@pytest.mark.parametrize("monitor_first", [False, True])
def test_wandb_refuses_nothing_whatever_step_the_loop_logs_at(rows: str, monitor_first: bool, tmp_path: Path) -> None:
    """A sample every third step, which comes two steps late."""
    (tmp_path / "wandb").mkdir()
    taken, logged = list(range(0, STEPS, 3)), 0
    with wandb_run(tmp_path) as run:
        sink = WandbExporter(run)
        sink.start(run_info(), lambda: snapshot())
        for k in range(STEPS):
            calls = ROWS_OF_A_LOOP[rows](k)
            if monitor_first and k - 2 in taken:
                sink.export(measurement(k - 2))
            for n, options in enumerate(calls):
                run.log({f"loss_{n}": float(k)}, **options)
                logged += 1
                if not monitor_first and n == 0 and k - 2 in taken:
                    sink.export(measurement(k - 2))
            if not monitor_first and not calls and k - 2 in taken:
                sink.export(measurement(k - 2))
        sink.close("finished")
    found = READERS["wandb"](tmp_path / "wandb")
    assert [step for step, _ in found["ess_effective_size/blocks.0.mixer"]] == [k for k in taken if k + 2 < STEPS]
    assert sum(len(series) for tag, series in found.items() if tag.startswith("loss_")) == logged
