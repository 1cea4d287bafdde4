"""Batches that are run again by the callbacks of several processes."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

from tests.exporters.helpers import free_port
from tests.integrations.helpers import LanguageModel, callback, dataset, train
from tests.integrations.test_replays import EVIDENT, judge_at_once
from tests.ranks import saved_by_ranks

COLLAPSED: dict[str, Any] = {**EVIDENT, "evidence": {"batches": 2, "cut_ratio": 0.99, "silent_ratio": 0.99}}
COLLAPSED["diagnosis"] = {**COLLAPSED["diagnosis"], "metric": "loss", "metric_mode": "min", "metric_solved": 0.0}
MODES: dict[str, dict[str, Any] | None] = {
    "bare": None,
    "advise": {**COLLAPSED, "autopilot": "advise"},
    "auto": {**COLLAPSED, "autopilot": {"mode": "auto", "lag_steps": 2}},
}


def lightning(folder: Path, ess: Any, model: LanguageModel) -> None:
    """Train under Lightning's DDP."""
    import pytorch_lightning as pl
    from pytorch_lightning.strategies import DDPStrategy

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def training_step(self, batch: list[torch.Tensor]) -> Any:
            loss = self.inner(batch[0])["loss"]
            self.log("loss", loss, sync_dist=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    trainer = pl.Trainer(
        default_root_dir=folder,
        max_steps=12,
        max_epochs=-1,
        logger=False,
        callbacks=[] if ess is None else [ess],
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Module(), DataLoader(TensorDataset(dataset()), batch_size=4))


def of_rank(rank: int, place: str, port: int) -> None:
    """Train in each loop and mode, and save what this rank has found."""
    warnings.simplefilter("ignore")
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        TORCHELASTIC_RUN_ID="ranks",
        OMP_NUM_THREADS="1",
    )
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for loop in ("accelerate", "transformers", "lightning"):
        for mode, settings in MODES.items():
            ess = None if settings is None else callback(loop, **settings)
            model, folder = LanguageModel("wla"), Path(place, loop, mode)
            with pytest.MonkeyPatch.context() as patch:
                if mode == "advise":
                    judge_at_once(patch)
                if loop == "lightning":
                    lightning(folder, ess, model)
                else:
                    train(loop, folder, ess, model=model)
            monitor = None if ess is None else ess.monitor
            found[f"{loop} {mode}"] = {
                "model": model.state_dict(),
                "losses": model.losses,
                "actions": [] if monitor is None else [(a.step, a.action, a.outcome) for a in monitor.actions],
                "evidence": []
                if monitor is None
                else [(e.basis, e.batches, e.base, e.m50) for e in monitor._results._tracker.evidence.values()],
                "failures": 0 if monitor is None else monitor.snapshot().health.part_failures_total["replay"],
            }
    torch.save(found, Path(place) / f"{rank}.pt")
    dist.destroy_process_group()


def test_rank_0_alone_or_all_ranks_run_batches_again(tmp_path: Path) -> None:
    ranks = saved_by_ranks(of_rank, tmp_path, 2, free_port())
    for loop in ("accelerate", "transformers", "lightning"):
        for rank in ranks:
            bare, advise = rank[f"{loop} bare"], rank[f"{loop} advise"]
            assert bare["losses"] == advise["losses"], loop
            assert all(torch.equal(value, advise["model"][name]) for name, value in bare["model"].items()), loop
            assert advise["failures"] == rank[f"{loop} auto"]["failures"] == 0
        assert [e[:2] for e in ranks[0][f"{loop} advise"]["evidence"]] == [("loss", 2)], loop
        assert ranks[1][f"{loop} advise"]["evidence"] == []
        one, other = (rank[f"{loop} auto"] for rank in ranks)
        assert [e[:2] for e in one["evidence"]] == [("loss", 4)], loop
        assert one["evidence"] == other["evidence"]
        assert one["actions"] == other["actions"] == [(8, "pull_to_identity", "applied")], loop
        assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items()), loop
