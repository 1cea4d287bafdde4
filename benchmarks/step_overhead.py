"""What the callback costs a Lightning run at its defaults: runs with and without it in turn, compared pair by pair."""

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

STEPS, PAIRS, WARM_UP = 250, 6, 20
MAX_OVERHEAD = 0.01


class Module(pl.LightningModule):
    """A two-layer GLA on recall; notes the time of every step."""

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


def train(callbacks: list[pl.Callback], folder: str) -> list[float]:
    """Seconds from step to step, after a warm-up."""
    module = Module()
    data = MQAR(MQARConfig(length=128, kv_pairs=16, vocab_size=256, samples=STEPS * 16, seed=0))
    trainer = pl.Trainer(
        max_steps=STEPS,
        callbacks=callbacks,
        logger=CSVLogger(folder),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=16))
    stamps = module.stamps[WARM_UP:]
    return [b - a for a, b in itertools.pairwise(stamps)]


def run() -> Result:
    """Median and mean step time of each run; the ratio of each pair."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    rows = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train([], folder)
        for pair in range(PAIRS):
            callback = ESSMonitorCallback(table=False)
            order = [[], [callback]] if pair % 2 == 0 else [[callback], []]
            times = {len(callbacks): train(callbacks, folder) for callbacks in order}
            without, with_callback = times[0], times[1]
            rows.append(
                {
                    "pair": pair,
                    "without, median ms": 1e3 * statistics.median(without),
                    "with, median ms": 1e3 * statistics.median(with_callback),
                    "median ratio": statistics.median(with_callback) / statistics.median(without),
                    "mean ratio": statistics.mean(with_callback) / statistics.mean(without),
                    "own account": callback.monitor.overhead_ratio if callback.monitor else 0.0,
                }
            )
    overhead = statistics.median(row["median ratio"] for row in rows) - 1
    total = statistics.median(row["mean ratio"] for row in rows) - 1
    failures = (
        [] if overhead <= MAX_OVERHEAD else [f"median overhead {overhead:.2%}, target at most {MAX_OVERHEAD:.0%}"]
    )
    return Result(
        f"Lightning step time, {PAIRS} pairs of {STEPS} steps, callback at its defaults",
        rows,
        [f"median overhead of a step {overhead:+.2%}; of the whole run (mean step) {total:+.2%}"],
        failures,
    )


if __name__ == "__main__":
    sys.exit(main([run], __doc__))
