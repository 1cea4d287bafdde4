"""A collapse found and treated under Lightning on several ranks: each measures its own data, all of them act alike.

    torchrun --nproc-per-node 2 examples/ranks_lightning.py [--strategy ddp|fsdp2] [--steps 1200] [--no-monitor]
                                                            [--die RANK:STEP]

The run is that of `make demo` (see recall.py), its batch shared among the ranks. At the end each rank's model is
fingerprinted: after the interventions they must still be the same. `--no-monitor` trains the same without, for
comparing the time of a step; `--die 1:100` kills rank 1 at step 100, to see that the run ends as it would without us.
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
    """The same module, each block sharded by `fully_shard`."""

    def configure_model(self) -> None:
        """Called by `ModelParallelStrategy` once the mesh is there."""
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class HookHandle(pl.Callback):
    """Times the steps."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Batch and optimizer step are one here."""
        self._steps.ended(trainer.global_step)


def main() -> int:
    """Train, and compare the ranks."""
    arguments = options(__doc__, "runs/ranks_lightning", strategies=("ddp", "fsdp2"))
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    steps = Steps(arguments.die, rank)
    callbacks: list[pl.Callback] = [HookHandle(steps)]
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
        print("one process only; start it with: torchrun --nproc-per-node 2 " + sys.argv[0])
        return 2
    accuracy = float(trainer.callback_metrics["accuracy"])
    wrong = summarize(arguments, module, steps, accuracy, None if ess is None else ess.monitor)
    dist.barrier()  # a rank that leaves while another still talks to it can abort
    dist.destroy_process_group()
    return wrong


if __name__ == "__main__":
    sys.exit(main())
