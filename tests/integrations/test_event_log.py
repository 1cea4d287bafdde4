"""Under a framework's loop the event log is in the loop's own log folder, and the run's last lines say so."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ess_monitor.cli.main import app
from ess_monitor.exporters import EventLogConfig, EventLogExporter
from ess_monitor.integrations.loop_logs import default_event_log, in_log_folder, log_folder
from tests.integrations.helpers import LanguageModel, callback, dataset, hf_trainer, measurements

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning_fabric"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]

LOG = "ess_events.jsonl"
STEPS = 7


def lightning(folder: Path, ess: Any, logger: Any = True) -> Path:
    """Train with Lightning's logger, CSV unless another one is given; return its folder."""
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import CSVLogger
    from torch.utils.data import DataLoader

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = LanguageModel()

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            return self.inner(batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    logger = CSVLogger(folder, name="csv") if logger is True else logger
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_steps=STEPS,
        logger=logger,
        callbacks=[ess],
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    trainer.fit(Module(), DataLoader(dataset(), batch_size=4))
    return Path(logger.log_dir) if logger else folder


def transformers(folder: Path, ess: Any) -> Path:
    """Train with the Trainer; return its output folder."""
    hf_trainer(folder, LanguageModel(), ess, STEPS, save_strategy="no").train()
    return folder


def fabric(folder: Path, ess: Any) -> Path:
    """Train with Fabric and its CSV logger; return its folder."""
    from lightning_fabric import Fabric
    from lightning_fabric.loggers import CSVLogger

    logger = CSVLogger(folder, name="csv")
    loop = Fabric(accelerator="cpu", devices=1, callbacks=[ess], loggers=logger)
    model = LanguageModel()
    wrapped, optimizer = loop.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    with ess.watch(loop, wrapped):
        for tokens in dataset().split(4)[:STEPS]:
            loss = wrapped(tokens)["loss"]
            loop.backward(loss)
            optimizer.step()
            ess.step({"loss": loss})
            loop.log("loss", loss)
    logger.finalize("success")
    return Path(logger.log_dir)


def accelerate(folder: Path, ess: Any) -> Path:
    """Train with accelerate and a project folder; return that."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, project_dir=str(folder))
    model = LanguageModel()
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    with ess.watch(accelerator, wrapped):
        for tokens in dataset().split(4)[:STEPS]:
            loss = wrapped(tokens)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            ess.step({"loss": loss}, optimizer=optimizer)
    return folder


LOOPS = {"lightning": lightning, "transformers": transformers, "fabric": fabric, "accelerate": accelerate}


@pytest.mark.parametrize("loop", LOOPS)
def test_the_log_is_where_the_loop_logs_and_the_last_lines_name_it(
    loop: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    folder = LOOPS[loop](tmp_path / "logs", callback(loop, table=True))
    assert [m.step for m in measurements(folder / LOG)] == [0, 3, 6]
    said = "".join(capfd.readouterr())
    last = [line for line in said.splitlines() if "ess-monitor report" in line][-1]
    assert str(folder / LOG) in last
    command = last.partition("ess-monitor ")[2].split()
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "page.html").stat().st_size > 10_000
    assert not list(work.iterdir())


@pytest.mark.parametrize("loop", ["lightning", "transformers"])
def test_switched_off_there_is_none(loop: str, tmp_path: Path) -> None:
    LOOPS[loop](tmp_path, callback(loop, event_log=False))
    assert not list(tmp_path.rglob(LOG))


def test_a_loop_without_a_logger_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lightning(tmp_path, callback("lightning"), logger=False)
    assert not list(tmp_path.rglob(LOG))


def test_one_that_is_asked_for_without_a_path_is_there_too_and_is_the_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = lightning(tmp_path, callback("lightning", exporters=["event_log"]))
    assert list(tmp_path.rglob(LOG)) == [folder / LOG]
    assert len(measurements(folder / LOG)) == 3


@pytest.mark.parametrize("as_object", [False, True])
def test_one_with_a_path_stays_there_and_is_the_only_one(tmp_path: Path, as_object: bool) -> None:
    path = tmp_path / "elsewhere" / "own.jsonl"
    asked = EventLogExporter(EventLogConfig(path=path)) if as_object else {"kind": "event_log", "path": str(path)}
    lightning(tmp_path, callback("lightning", exporters=[asked]))
    assert not list(tmp_path.rglob(LOG))
    assert len(measurements(path)) == 3


def test_a_folder_that_cannot_be_written_costs_a_warning_and_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING, "ess_monitor"):
        assert default_event_log(tmp_path / "file") == []
    [record] = caplog.records
    assert str(tmp_path / "file" / LOG) in record.getMessage()


class _Logger(SimpleNamespace):
    @property
    def experiment(self) -> None:
        """Opened by looking."""


@pytest.mark.parametrize(
    ("loggers", "folder"),
    [
        ([], None),
        ([_Logger(log_dir="a/version_3")], Path("a/version_3")),
        ([_Logger(log_dir=None, save_dir="out", name="mine", version=2)], Path("out/mine/version_2")),
        ([_Logger(save_dir="out", name="mine", version="x7")], Path("out/mine/x7")),
        ([_Logger(save_dir=None, name="mine", version="x7")], None),
        ([_Logger(log_dir="s3://bucket/a")], None),
        ([_Logger(log_dir="a"), _Logger(log_dir="b")], Path("a")),
    ],
)
def test_the_folder_is_that_of_the_first_logger_where_it_is_a_local_one(
    loggers: list[Any], folder: Path | None
) -> None:
    assert log_folder(loggers) == folder


def test_settings_of_other_exporters_stay_as_they_are() -> None:
    with_path = EventLogConfig(path="own.jsonl")
    assert in_log_folder(with_path, "folder") is with_path
    assert in_log_folder(EventLogConfig(max_bytes=5000), "folder") == EventLogConfig(
        path=Path("folder", LOG), max_bytes=5000
    )
