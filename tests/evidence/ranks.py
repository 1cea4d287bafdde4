"""Processes under DDP, FSDP and FSDP2 that run batches again: what each of them runs."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ess_monitor.errors import CaptureError
from ess_monitor.evidence.data_parallel import why_not_alone
from ess_monitor.evidence.undisturbed import Undisturbed
from tests.evidence.dump import differences
from tests.evidence.models import WIDTH, Around, Counting
from tests.evidence.training import (
    Between,
    Raised,
    Recorded,
    called_as_it_is,
    left_by_an_error,
    replayed,
    tokens,
    trained,
    vectors,
)


def within_group(rank: int, folder: str, count: int, work: Callable[[int], Any]) -> None:
    """Save to `folder`/<rank>.pt what `work` returns in a process group of `count` ranks."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = (Path(folder) / "meeting").as_uri()
    wait = timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count, timeout=wait)
    try:
        torch.save(work(rank), Path(folder) / f"{rank}.pt")
        dist.barrier()  # a rank that leaves while the other still talks to it can abort
    finally:
        dist.destroy_process_group()


def norm() -> nn.Module:
    """Batch norm, counters and dropout."""
    return Around(nn.Sequential(nn.BatchNorm1d(WIDTH), Counting()), dropout=0.3)


def replayed_alone(model: Any, batch: Tensor) -> None:
    """As the function without it."""
    replayed(model, batch, alone=True)


def of_rank(rank: int) -> Callable[[int], Tensor]:
    """The data of one rank."""
    return lambda step: vectors(step) + 0.1 * rank


def broadcasts(*, alone: bool) -> int:
    """How often two replays send buffers, and the forward pass of the training after them."""
    model, sent = DistributedDataParallel(norm()), []
    send = model._sync_buffers
    model._sync_buffers = lambda: sent.append(send())  # type: ignore[method-assign]
    with Undisturbed(model, alone=alone) as block:
        for _ in range(2):
            block.rewind()
            model(vectors(0))
    model(vectors(0))
    return len(sent)


def under_ddp(rank: int, folder: str, count: int) -> None:
    """Trainings with replays of all ranks, of rank 0 alone, and with calls that are no replays."""

    def only_on_rank_0(between: Between) -> Between:
        return between if rank == 0 else lambda model, batch: None

    def work(rank: int) -> dict[str, Any]:
        options = {"batch": of_rank(rank), "wrap": DistributedDataParallel}
        plain = trained(norm, **options)
        return {
            "all": differences(plain, trained(norm, replayed, **options)),
            "alone": differences(plain, trained(norm, only_on_rank_0(replayed_alone), **options)),
            "left by an error": differences(plain, trained(norm, left_by_an_error, **options)),
            "recorded": differences(plain, trained(norm, Recorded(), **options)),
            "recorded alone": differences(plain, trained(norm, only_on_rank_0(Recorded(alone=True)), **options)),
            "control": bool(differences(plain, trained(norm, called_as_it_is, **options))),
            "sent": broadcasts(alone=False),
            "sent alone": broadcasts(alone=True),
        }

    within_group(rank, folder, count, work)


def net() -> nn.Module:
    """Of several layers that are sharded each, with a buffer and dropout."""
    from ess_monitor.featurizers import Backbone, BackboneConfig
    from tests.evidence.models import Language

    return Language(Backbone(BackboneConfig(vocab_size=32, width=8, num_heads=2, state_size=4)))


def sharded2(model: Any) -> Any:
    """By `fully_shard`."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded1(model: nn.Module) -> nn.Module:
    """By `FullyShardedDataParallel`."""
    from ess_monitor.featurizers.backbone import Block

    policy = ModuleWrapPolicy({Block})
    device = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=device, use_orig_params=True)


WAYS: dict[str, Callable[[Any], Any]] = {"fsdp1": sharded1, "fsdp2": sharded2}


def held(model: nn.Module) -> dict[str, Tensor]:
    """What this rank holds of the parameters."""
    own = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in own.items()}


def sharded_training(wrap: Callable[[Any], Any], between: Between | None, *, doubles: bool = False) -> dict[str, Any]:
    """What this rank holds after some steps; with `doubles` a parameter of the root is written to before each."""
    torch.manual_seed(0)
    called = wrap(net().train())
    optimizer = torch.optim.AdamW(called.parameters(), lr=0.01)
    losses = []
    for step in range(4):
        if between is not None and step:
            between(called, tokens(100 + step))
        if doubles and step:
            with torch.no_grad():
                for parameter in called.parameters():
                    parameter.mul_(1.5)
        loss = called(tokens(step)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if between is not None:
        between(called, tokens(200))
    state = {name: tensor.tolist() for name, tensor in held(called).items()}
    return {**state, "losses": losses, "random": torch.get_rng_state().tolist()}


def fails_inside(model: Any, batch: Tensor) -> None:
    """Raise in the middle of a forward pass, inside a sharded block, and run another one in the same block."""
    from ess_monitor.featurizers.backbone import SwiGLU

    inner = [module for module in model.modules() if isinstance(module, SwiGLU)][-1]

    def fail(*_: object) -> None:
        raise Raised

    with Undisturbed(model) as block:
        for fails in (True, False, True):
            handle = inner.register_forward_hook(fail) if fails else None
            block.rewind()
            try:
                model(batch)
            except Raised:
                assert handle is not None
            finally:
                if handle is not None:
                    handle.remove()


def under_fsdp(rank: int, folder: str, way: str, count: int) -> None:
    """Trainings of a sharded model with replays of all ranks."""
    wrap = WAYS[way]

    def work(rank: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        plain, written = sharded_training(wrap, None), sharded_training(wrap, None, doubles=True)
        for between in (replayed, fails_inside, left_by_an_error):
            found[between.__name__] = differences(plain, sharded_training(wrap, between))
            found[f"{between.__name__} written"] = differences(written, sharded_training(wrap, between, doubles=True))
        recorded = Recorded()
        found["recorded"] = differences(plain, sharded_training(wrap, recorded))
        assert recorded.count == 3
        found["control"] = bool(differences(plain, sharded_training(wrap, called_as_it_is)))
        stale = sharded_training(wrap, called_as_it_is, doubles=True)
        found["control written"] = stale["losses"] != written["losses"]
        return found

    within_group(rank, folder, count, work)


def reasons(rank: int, folder: str, count: int) -> None:
    """Why these models cannot be run by one rank."""

    def work(rank: int) -> dict[str, str]:
        linear = nn.Sequential(nn.Linear(4, 4))
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
        synchronized = nn.Sequential(nn.SyncBatchNorm(4))
        found = {
            "plain": why_not_alone(linear),
            "ddp": why_not_alone(DistributedDataParallel(norm())),
            "fsdp1": why_not_alone(sharded1(net())),
            "fsdp1 inside": why_not_alone(sharded1(net()).module),  # type: ignore[arg-type]
            "fsdp2": why_not_alone(sharded2(net())),
            "tensor": why_not_alone(parallelize_module(linear, mesh, {"0": ColwiseParallel()})),
            "norm": why_not_alone(synchronized),
            "norm in eval mode": why_not_alone(synchronized.eval()),
        }
        ddp = DistributedDataParallel(norm())
        with ddp.join():
            found["join"] = why_not_alone(ddp)
        try:
            with Undisturbed(sharded2(net()), alone=True):
                raise AssertionError
        except CaptureError as error:
            found["refused"] = str(error)
        assert torch.is_grad_enabled()
        return found

    within_group(rank, folder, count, work)
