"""Measures the cost of the Lightning callback at its defaults: blocks of steps with and without it alternate.

Whole runs differ by several percent because of the machine. Therefore the callback is switched on and off within one
run, every 100 steps, and each watched block is compared with the bare blocks before and after it.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import sys
import tempfile
import time
import warnings

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader

from benchmarks.report import Result, main
from ess_monitor.featurizers import Backbone, BackboneConfig
from ess_monitor.integrations.lightning import ESSMonitorCallback
from ess_monitor.tasks import MQAR, MQARConfig, loss

BLOCK, PAIRS = 100, 12
MAX_OVERHEAD = 0.01


class Module(pl.LightningModule):
    """A two-layer GLA on recall that records the time of every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Backbone(BackboneConfig(vocab_size=256, width=64, depth=2, featurizer="gla", state_size=32))
        self.stamps: list[float] = []

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        self.stamps.append(time.perf_counter())
        tokens, targets = batch
        return loss(self.model(tokens), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class InTurn(ESSMonitorCallback):
    """The callback at its defaults, active in every second block of steps."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        """Step the monitor in watched blocks; disarm a sample that is left at the end of a block."""
        assert self.monitor is not None
        if watched(trainer.global_step):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif self.monitor.armed:
            self.monitor.disarm()


def watched(step: int) -> bool:
    """Return whether the step is in a watched block: the odd ones."""
    return step // BLOCK % 2 == 1


def run() -> Result:
    """Compare the step time of each watched block with that of the bare blocks before and after it."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    callback = InTurn(table=False)
    module = Module()
    data = MQAR(MQARConfig(length=128, kv_pairs=16, vocab_size=256, samples=(2 * PAIRS + 1) * BLOCK * 16, seed=0))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_steps=(2 * PAIRS + 1) * BLOCK,
            callbacks=[callback],
            logger=CSVLogger(folder),
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, DataLoader(data, batch_size=16))
    seconds = [b - a for a, b in itertools.pairwise(module.stamps)]
    blocks = [seconds[k * BLOCK : (k + 1) * BLOCK] for k in range(2 * PAIRS + 1)]
    rows = []
    for k in range(1, 2 * PAIRS, 2):
        before, on, after = (statistics.median(block) for block in blocks[k - 1 : k + 2])
        mean_before, mean_on, mean_after = (statistics.mean(block) for block in blocks[k - 1 : k + 2])
        rows.append(
            {
                "block": k,
                "bare, median ms": 1e3 * (before + after) / 2,
                "watched, median ms": 1e3 * on,
                "median ratio": 2 * on / (before + after),
                "mean ratio": 2 * mean_on / (mean_before + mean_after),
            }
        )
    overhead = statistics.median(row["median ratio"] for row in rows) - 1
    total = statistics.median(row["mean ratio"] for row in rows) - 1
    account = callback.monitor.overhead_ratio if callback.monitor else 0.0
    samples = callback.monitor.snapshot().measurements_total["ok"] if callback.monitor else 0
    failures = (
        [] if overhead <= MAX_OVERHEAD else [f"median overhead {overhead:.2%}, target at most {MAX_OVERHEAD:.0%}"]
    )
    return Result(
        f"Lightning step time, {PAIRS} blocks of {BLOCK} steps with the callback at its defaults, between bare ones",
        rows,
        [
            f"median overhead of a step {overhead:+.2%}; of the whole run (mean step) {total:+.2%}; "
            f"{samples} samples taken; the monitor's own account {account:.2%} of the watched time"
        ],
        failures,
    )


if __name__ == "__main__":
    sys.exit(main([run], __doc__))
