"""Random tokens on one rank of two, whose model is in DistributedDataParallel and has a buffer to broadcast."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ess_monitor import Monitor, MonitorConfig
from ess_monitor.featurizers import Backbone, BackboneConfig
from tests.ranks import saved_by_ranks

RANKS, STEPS, EVERY = 2, 6, 2


class Buffered(nn.Module):
    """Counts its forward passes in training, as a BatchNorm does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Backbone(BackboneConfig(vocab_size=64, width=16, state_size=8))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
        return self.net(tokens)


class Wrapper(nn.Module):
    """A module of a library around DistributedDataParallel."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.module(tokens)


def train(rank: int, *, wrapped: bool) -> dict[str, Any]:
    model: nn.Module = DistributedDataParallel(Buffered())
    if wrapped:
        model = Wrapper(model)
    config = MonitorConfig.load(
        environment=False, every_n_steps=EVERY, overhead_budget_ratio=None, capture={"source": "random_tokens"}
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, config) as monitor:
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(100 * rank + step)
            model(torch.randint(0, 64, (2, 12), generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
        readings = monitor.flush()
    state = {name.replace("module.", ""): value for name, value in model.state_dict().items()}
    return {"state": state, "statuses": [r.status for r in readings]}


def one_rank(rank: int, folder: str) -> None:
    os.environ.update(LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=20))
    torch.save([train(rank, wrapped=wrapped) for wrapped in (False, True)], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_probe_on_one_rank_leaves_the_collectives_of_the_training_alone(tmp_path: Path) -> None:
    ranks = saved_by_ranks(one_rank, tmp_path, RANKS)
    for first, second in zip(*ranks, strict=True):
        assert set(first["statuses"]) == {"ok"}
        assert first["state"].keys() == second["state"].keys()
        for name, value in first["state"].items():
            assert torch.equal(value, second["state"][name]), name
        assert first["state"]["calls"] == STEPS
