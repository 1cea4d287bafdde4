"""Two processes under DDP and FSDP2: what each of them runs."""

from __future__ import annotations

import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.layers.mamba import hf
from ess_monitor.capture import Sampler, find_layers
from ess_monitor.interventions import IdentityPull, collect_penalties, rescale_alpha
from tests.capture.adapters.helpers import EVERYTHING, STRENGTH, exact

WORLD_SIZE = 2
FACTOR = 8.0
WAYS = ("ddp", "fsdp2")


def model() -> tuple[nn.Module, Tensor]:
    """A small Mamba-2 and a token batch."""
    with torch.random.fork_rng(devices=()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        sizes = {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8, "expand": 2}
        built, (tokens,), _ = hf("Mamba2", **sizes)
    return built.train(), tokens


def loss(called: Any, tokens: Tensor) -> Tensor:
    """Of one batch."""
    found: Tensor = called(tokens, use_cache=False).logits.square().mean()
    return found


def wrapped(how: str, net: nn.Module) -> Any:
    """As users wrap it."""
    if how == "ddp":
        return DistributedDataParallel(net)
    for block in net.backbone.layers:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(net)
    return net


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, put together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def observed(called: Any, net: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """What a sample captures, the gradients under the pull, and the operators after alpha was rescaled."""
    sampler = Sampler(find_layers(called), EVERYTHING)
    sampler.arm()
    loss(called, tokens).backward()
    net.zero_grad()
    taken = {item.layer.name: exact(item.operator) for item in sampler.collect()}  # type: ignore[union-attr]
    layer = find_layers(called)[-1]
    assert layer.spec.decay is not None
    pull = IdentityPull(layer.module, layer.spec.decay, STRENGTH)
    pull.attach()
    loss(called, tokens).backward()
    pull.detach()
    gradients = {name: whole(p.grad).clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0)
    loss(called, tokens).backward()
    optimizer.step()
    rescale_alpha(layer.module, FACTOR, optimizer=optimizer, handle=layer.spec.alpha)
    parameter = layer.module.get_parameter("A_log")
    moments = optimizer.state[parameter]["exp_avg"]
    return {
        "operators": taken,
        "gradients": gradients,
        "A_log": whole(parameter).detach().clone(),
        "moments": whole(moments).clone(),
    }


def expected() -> dict[str, Any]:
    """The same in one process, from the loss with the added term."""
    net, tokens = model()
    found = observed(net, net, tokens)
    net, tokens = model()
    layer = find_layers(net)[-1]
    with collect_penalties(net, [layer.name]) as penalties:
        value = loss(net, tokens)
    (value + STRENGTH * penalties.total()).backward()
    return {**found, "gradients": {n: p.grad for n, p in net.named_parameters() if p.grad is not None}}


def observe(rank: int, folder: str) -> None:
    """Save what this rank sees under every way to `folder`/rank.pt."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=(Path(folder) / "rendezvous").as_uri(),
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=60),
    )
    try:
        found = {}
        for how in WAYS:
            net, tokens = model()
            found[how] = observed(wrapped(how, net), net, tokens)
        torch.save(found, Path(folder) / f"{rank}.pt")
        dist.barrier()  # a rank that leaves while the other still talks to it can abort
    finally:
        dist.destroy_process_group()
