"""A^power by alpha on two ranks that share a model: FSDP holds the whole parameter only while the layer runs."""

from __future__ import annotations

import dataclasses
import math
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from ess_monitor.capture import Layer, find_layers
from ess_monitor.capture.decay_power import decay_raised
from ess_monitor.featurizers import S6
from tests.ranks import saved_by_ranks

RANKS, POWERS = 2, (0.5, math.inf)
WAYS = ("fsdp2, the layer alone", "fsdp2, the model", "fsdp1", "fsdp1, flat")
X = torch.linspace(-1, 1, 2 * 12 * 16).view(2, 12, 16).sin()


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16), S6(16, state_size=4), nn.Linear(16, 16))


def last_layer(model: nn.Module) -> Layer:
    """The S6, read as a layer that computes A from its parameters."""
    [layer] = find_layers(model)
    return dataclasses.replace(layer, spec=dataclasses.replace(layer.spec, decay=None))


def wrapped(how: str) -> nn.Module:
    model = net()
    if how.startswith("fsdp1"):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=how == "fsdp1")
    mesh = init_device_mesh("cpu", (RANKS,))
    if how == "fsdp2, the layer alone":
        fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def held(model: nn.Module) -> list[Tensor]:
    """What this rank holds of the parameters between the steps of a training."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a pass without gradients, the root is still whole
    return [(p.to_local() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def trained(model: nn.Module) -> list[Tensor]:
    """What this rank holds after a step of SGD."""
    model(X).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return held(model)


def seen_by(how: str) -> dict[str, Any]:
    model, twin = wrapped(how), wrapped(how)
    layer = last_layer(model)
    before = held(model)
    with torch.no_grad():
        found: dict[str, Any] = {"plain": model(X)}
        for power in POWERS:
            with decay_raised(layer, power) as raised:
                found[str(power)] = model(X)
            found[f"{power} calls"] = raised.calls
        found["after"] = model(X)
    found["parameters"] = all(map(torch.equal, held(model), before))
    found["training"] = all(map(torch.equal, trained(model), trained(twin)))
    return found


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    torch.save({how: seen_by(how) for how in WAYS}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return saved_by_ranks(one_rank, folder, RANKS)


@pytest.mark.parametrize("how", WAYS)
def test_every_rank_computes_with_the_raised_decay_and_has_its_parameters_back(ranks: list[Any], how: str) -> None:
    model = net()
    with torch.no_grad():
        alone = {"plain": model(X)}
        for power in POWERS:
            with decay_raised(last_layer(model), power):
                alone[str(power)] = model(X)
    for rank in ranks:
        found = rank[how]
        for name, output in alone.items():
            torch.testing.assert_close(found[name], output)
        assert torch.equal(found["after"], found["plain"])
        assert not torch.allclose(found["0.5"], found["plain"], rtol=1e-3)
        assert [found[f"{power} calls"] for power in POWERS] == [1, 1]
        assert found["parameters"]
        assert found["training"]
