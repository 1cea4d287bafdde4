"""One rank of a Lightning run whose second layer forgets, and is rescued. A process of its own, as under torchrun.

    python -m tests.observability.training TARGETS EVENT_LOG

Model and task are those of the demo; the diagnosis is impatient.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from typing import Any

import pytorch_lightning as pl
import torch

from ess_monitor.integrations.lightning import ESSMonitorCallback
from examples.recall import Recall, RecallModule

STEPS = 20_000
"""More than anybody waits for: the test ends the run."""
SECONDS_PER_STEP = 0.03
"""At least. On a machine that trains faster the collapse would be over between two scrapes."""

DIAGNOSIS = {
    "warmup_steps": 50,
    "patience": 3,
    "collapsed_below": 0.3,
    "collapsed_recovers_above": 0.38,
    "retention_below": 0.7,
    "retention_recovers_above": 0.85,
}
"""The gate starts at 1/2, so the layer is collapsed from the first step, at 0.14 of what is attainable and a retention
of 0.3. Treated it is at 0.41 and 0.76 after 390 steps; left alone it stays at or below 0.27 and 0.61 until step 590 at
least."""


class Pace(pl.Callback):
    """Begins when told to on the standard input, and trains no faster than a scrape can follow."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait: service discovery takes seconds, and a run that matters takes hours."""
        sys.stdin.readline()
        self._next = time.monotonic()

    def on_train_batch_end(self, *_: Any) -> None:
        """Wait for the step's time to pass."""
        time.sleep(max(0.0, self._next - time.monotonic()))
        self._next = time.monotonic() + SECONDS_PER_STEP


def main(targets: str, event_log: str) -> None:
    """Train until killed."""
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
    ess = ESSMonitorCallback(
        every_n_steps=10,
        overhead_budget_ratio=None,
        diagnosis=DIAGNOSIS,
        autopilot={"mode": "auto", "lag_steps": 2},
        exporters=[
            {"kind": "prometheus", "port": 0, "ranks": "all", "file_sd_dir": targets},
            {"kind": "event_log", "path": event_log},
        ],
        table=False,
    )
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy="ddp",
        callbacks=[ess, Pace()],
        logger=False,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    # Two ranks share the batch of 32 that the figures above were found with.
    trainer.fit(RecallModule(Recall(steps=STEPS, batch_size=16)))


if __name__ == "__main__":
    main(*sys.argv[1:])
