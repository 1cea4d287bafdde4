"""Trains on several ranks under Lightning, and treats a collapsed layer in the same way on all of them.

    torchrun --nproc-per-node 2 examples/ranks_lightning.py [--strategy ddp|fsdp2] [--steps 1200] [--no-monitor]
                                                            [--die RANK:STEP]

The run is that of `make demo` (see recall.py). The batch is divided among the ranks, and each rank measures its own
part. At the end rank 0 prints a fingerprint of each rank's model: they must be equal after the interventions.
`--no-monitor` trains without a monitor, to compare the time of a step. `--die 1:100` kills rank 1 at step 100, to show
that the run ends as it would without a monitor.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import ModelParallelStrategy
from ranks import BATCH, Steps, options, summarize
from recall import Recall, RecallModule
from torch.distributed.fsdp import fully_shard

from ess_monitor.integrations.lightning import ESSMonitorCallback


class Sharded(RecallModule):
    """A `RecallModule` whose blocks are sharded by `fully_shard`."""

    def configure_model(self) -> None:
        """Shard the model. `ModelParallelStrategy` calls this once the mesh exists."""
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class StepTimer(pl.Callback):
    """Times the steps."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Record the step: here every batch is one optimizer step."""
        self._steps.ended(trainer.global_step)


def main() -> int:
    """Train, and compare the ranks; return 1 if they differ."""
    arguments = options(__doc__, "runs/ranks_lightning", strategies=("ddp", "fsdp2"))
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    steps = Steps(arguments.die, rank)
    callbacks: list[pl.Callback] = [StepTimer(steps)]
    ess = None
    if not arguments.no_monitor:
        events = arguments.out / "events.jsonl"
        ess = ESSMonitorCallback(
            arguments.settings, table=False, exporters=[{"kind": "event_log", "path": str(events)}]
        )
        callbacks.append(ess)
    sharded = arguments.strategy == "fsdp2"
    strategy = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1) if sharded else "ddp"
    trainer = pl.Trainer(
        max_steps=arguments.steps,
        accelerator="cpu",
        strategy=strategy if world > 1 else "auto",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        num_nodes=world // int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        logger=False,
        callbacks=callbacks,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    module = (Sharded if sharded else RecallModule)(Recall(steps=arguments.steps * world, batch_size=BATCH // world))
    trainer.fit(module)
    if not dist.is_initialized():
        print("This example needs several processes. Start it with: torchrun --nproc-per-node 2 " + sys.argv[0])
        return 2
    accuracy = float(trainer.callback_metrics["accuracy"])
    wrong = summarize(arguments, module, steps, accuracy, None if ess is None else ess.monitor)
    dist.barrier()  # a rank can abort if another one exits while they still communicate
    dist.destroy_process_group()
    return wrong


if __name__ == "__main__":
    sys.exit(main())
