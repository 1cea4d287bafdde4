"""Trains on several ranks in a plain loop under FSDP2, and treats a collapsed layer in the same way on all of them.

    torchrun --nproc-per-node 2 examples/ranks_fsdp2.py [--steps 1200] [--no-monitor] [--die RANK:STEP]

The run is that of `make demo` (see recall.py). The batch is divided among the ranks, and `fully_shard` shards each
block. At the end the shards are gathered, and rank 0 prints a fingerprint of each rank's model. `--no-monitor` trains
without a monitor, to compare the time of a step. `--die 1:100` kills rank 1 at step 100, to show that the run ends as
it would without a monitor.
"""

from __future__ import annotations

import contextlib
import sys
from functools import partial

import torch
import torch.distributed as dist
from ranks import BATCH, Steps, options, summarize
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ess_monitor import Monitor, MonitorConfig
from ess_monitor.featurizers import Backbone, BackboneConfig
from ess_monitor.tasks import MQAR, MQARConfig, accuracy, loss

TASK = {"length": 32, "kv_pairs": 4, "vocab_size": 32}


def batch_loss(model: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of a batch; the monitor calls it to see what the loss says of a layer that looks collapsed."""
    return loss(model(tokens), targets)


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Return the mean of a number over the ranks."""
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


def main() -> int:
    """Train, and compare the ranks; return 1 if they differ."""
    arguments = options(__doc__, "runs/ranks_fsdp2")
    torch.set_num_threads(1)
    if not dist.is_torchelastic_launched():
        print("This example needs several processes. Start it with: torchrun --nproc-per-node 2 " + sys.argv[0])
        return 2
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(vocab_size=32, featurizer="wla", state_size=16, mixer_options={"beta": 1.0}))
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("data",))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    data, mine = MQAR(MQARConfig(samples=arguments.steps * BATCH, **TASK)), BATCH // world
    steps, monitor = Steps(arguments.die, rank), None
    if not arguments.no_monitor:
        exporters = [{"kind": "event_log", "path": str(arguments.out / "events.jsonl")}] if rank == 0 else []
        monitor = Monitor(
            model,
            MonitorConfig.load(**arguments.settings, exporters=exporters),
            strategy="fsdp2",
            world_size=world,
        )
    with monitor or contextlib.nullcontext():
        for step in range(arguments.steps):
            first = BATCH * step + mine * rank
            tokens, targets = data.batch(range(first, first + mine))
            logits = model(tokens)
            value = loss(logits, targets)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if monitor is not None:
                metrics = {"loss": value, "accuracy": accuracy(logits, targets)} if monitor.armed else None
                monitor.step(metrics, optimizer=optimizer, replay=partial(batch_loss, model, tokens, targets))
            steps.ended(step + 1)
    final = mean_over_ranks(accuracy(logits, targets))
    wrong = summarize(arguments, model, steps, float(final), monitor)
    dist.barrier()  # a rank can abort if another one exits while they still communicate
    dist.destroy_process_group()
    return wrong


if __name__ == "__main__":
    sys.exit(main())
