"""Two processes with different data under DistributedDataParallel: what each of them runs."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.interventions.helpers import DECAYING, backbone, batch, gradients, pull_on, task_loss

WORLD_SIZE = 2


def averaged_gradients(rank: int, folder: str) -> None:
    """Save this rank's gradients of every featurizer with the pull attached to `folder`/rank.pt."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=(Path(folder) / "rendezvous").as_uri(),  # a file, not a port that another process may take
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=30),
    )
    try:
        found = {}
        for featurizer in DECAYING:
            model = backbone(featurizer)
            wrapped = DistributedDataParallel(model)
            pull_on(wrapped).attach()
            task_loss(wrapped, batch(seed=rank)).backward()
            found[featurizer] = gradients(model)
        torch.save(found, Path(folder) / f"{rank}.pt")
        dist.barrier()  # a rank that leaves while the other still talks to it can abort
    finally:
        dist.destroy_process_group()
