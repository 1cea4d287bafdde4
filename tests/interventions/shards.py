"""Two processes with a sharded alpha, a checkpoint that rank 0 writes alone, and who resumes from it."""

from __future__ import annotations

import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ess_monitor.capture import Layer, find_layers
from ess_monitor.interventions import gate
from ess_monitor.interventions.gate import gate_tensors
from ess_monitor.interventions.probation import Trial, TrialState
from ess_monitor.records import Condition
from tests.interventions.pilots import FIRST, LAST, Run

WORLD_SIZE = 2
COLLAPSED: dict[str, Condition] = {FIRST: "healthy", LAST: "collapsed"}
WAYS = ("fsdp2", "fsdp1")


class ShardedRun(Run):
    """A run over the ranks of the process group, or in one process without any."""

    def __init__(self, how: str) -> None:
        super().__init__("s6")
        self.called: Any = self.model
        if how == "fsdp2":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        elif how.startswith("fsdp1"):
            device, own = torch.device("cpu"), how == "fsdp1"
            self.called = FullyShardedDataParallel(self.model, device_id=device, use_orig_params=own)
        self.optimizer = torch.optim.Adam(self.called.parameters(), lr=1e-2)
        self.pilot = self.new_pilot()

    @property
    def alpha(self) -> Tensor:
        """What this rank holds of it."""
        held: Tensor = find_layers(self.model)[-1].module.A_log  # type: ignore[assignment]
        return held.to_local() if isinstance(held, DTensor) else held

    def train_once(self) -> None:
        """One optimizer step."""
        self.called(torch.arange(12).view(2, 6)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def moments(self) -> list[Tensor]:
        """The optimizer's of alpha, as far as this rank holds them."""
        state = self.optimizer.state[find_layers(self.model)[-1].module.A_log]  # type: ignore[index]
        return [v.to_local().clone() if isinstance(v, DTensor) else v.clone() for v in state.values()]

    def roll_back(self) -> dict[str, Any]:
        """What comes of it."""
        said = [action.outcome for action in self.measure(COLLAPSED, loss=99.0)]
        return {"said": said, "alpha": self.alpha.detach().clone(), "moments": self.moments()}


def group(folder: str, name: str, rank: int, size: int) -> None:
    """Join the process group of that name."""
    meeting = (Path(folder) / name).as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=60))


def in_two(how: str, rank: int, folder: str) -> dict[str, Any]:
    """Treated over two rungs and taken back; and treated, saved by rank 0, resumed by both, and taken back."""
    found: dict[str, Any] = {}
    for resume in (False, True):
        run = ShardedRun(how)
        run.train_once()
        before, moments = run.alpha.detach().clone(), run.moments()
        if how == "fsdp2":
            # The tests may gather; what is tested may not.
            found["whole before"] = find_layers(run.model)[-1].module.A_log.full_tensor().detach()  # type: ignore[operator]
        run.measure(COLLAPSED, times=3)
        if resume:
            if how == "fsdp2":
                found["whole after"] = find_layers(run.model)[-1].module.A_log.full_tensor().detach()  # type: ignore[operator]
            if rank == 0:
                torch.save(run.pilot.state_dict(), Path(folder) / f"{how}.state")
            dist.barrier()
            run.pilot = run.new_pilot()
            run.pilot.load_state_dict(torch.load(Path(folder) / f"{how}.state", weights_only=True))
        treated = run.alpha.detach().clone()
        key = "resumed" if resume else "same process"
        found[key] = {"before": before, "moments before": moments, "treated": treated, **run.roll_back()}
    return found


def from_whole_copy(how: str) -> dict[str, Any]:
    """What a run that is not sharded has saved, resumed and taken back by a sharded one."""
    plain, run = ShardedRun("plain"), ShardedRun(how)
    run.train_once()
    before = run.alpha.detach().clone()
    run.measure(COLLAPSED)
    plain.measure(COLLAPSED)
    run.pilot = run.new_pilot()
    run.pilot.load_state_dict(plain.pilot.state_dict())
    return {"before": before, **run.roll_back()}


def in_one(how: str, folder: str, treated: Tensor) -> dict[str, Any]:
    """What rank 0 of two has saved, resumed and taken back by one process."""
    run = ShardedRun(how)
    run.train_once()
    with torch.no_grad():
        run.alpha.copy_(treated)
    run.pilot.load_state_dict(torch.load(Path(folder) / "fsdp2.state", weights_only=True))
    return run.roll_back()


def trial_of_two(how: str, folder: str) -> dict[str, Any]:
    """The trial of two ranks, ended by one process, whose weights and steps are others."""
    run = ShardedRun(how)
    for _ in range(4):
        run.train_once()
    return trial_ended(run, folder, "fsdp2")


def uneven() -> list[tuple[Tensor, Tensor]]:
    """What was put to shards of which some ranks have more than others or none, and what they hold together then."""
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), []
    for shape in ((5, 2), (1, 3), (4,)):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        target = distribute_tensor(torch.zeros(shape), mesh, [Shard(0)])
        gate._put(target, value)
        found.append((value, target.full_tensor()))
    return found


def last_layer(run: ShardedRun) -> Layer:
    """The one that is treated."""
    return find_layers(run.model)[-1]


def held(run: ShardedRun, *, whole: bool) -> dict[str, Tensor]:
    """The gate and the optimizer's state of it: what this rank holds, or gathered."""
    found: dict[str, Tensor] = {}
    for name, tensor in gate_tensors(last_layer(run)).items():
        for key, value in {"": tensor, **run.optimizer.state[tensor]}.items():  # type: ignore[index]
            if isinstance(value, DTensor):
                value = value.full_tensor() if whole else value.to_local()
            found[name + key] = value.detach().clone()
    return found


def trial_in_two(how: str, rank: int, folder: str) -> dict[str, Any]:
    """A trial that rank 0 saves, resumed by both in the middle, and ended: the gate from before it comes back."""
    run = ShardedRun(how)
    run.train_once()
    before, whole = held(run, whole=False), held(run, whole=True)
    trial = Trial.begin_on(last_layer(run), run.optimizer, is_silent=False)
    if rank == 0:  # alone
        torch.save(trial.state_dict(), Path(folder) / f"{how}.trial")
    dist.barrier()
    run.train_once()
    run.train_once()
    return {"before": before, "whole before": whole, "later": held(run, whole=False), **trial_ended(run, folder, how)}


def trial_ended(run: ShardedRun, folder: str, how: str) -> dict[str, Any]:
    """The trial of that file, resumed by this run and ended without a gain."""
    state = TrialState.model_validate(torch.load(Path(folder) / f"{how}.trial", weights_only=True))
    trial = Trial.from_state(last_layer(run), state)
    trial.restore_gate(run.optimizer)
    return {"has a gate": trial.gate is not None, "back": held(run, whole=False)}


def observe(rank: int, folder: str) -> None:
    """Save what this rank sees to `folder`/rank.pt."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    group(folder, "two", rank, WORLD_SIZE)
    try:
        found: dict[str, Any] = {how: in_two(how, rank, folder) for how in WAYS}
        found["from a whole copy"] = {how: from_whole_copy(how) for how in WAYS}
        found["trial"] = {how: trial_in_two(how, rank, folder) for how in WAYS}
        found["uneven"] = uneven()
        flat = ShardedRun("fsdp1 flat")
        found["flat"] = [(a.action, a.outcome, a.message) for a in flat.measure(COLLAPSED)]
        dist.barrier()  # a rank that leaves while the other still talks to it can abort
    finally:
        dist.destroy_process_group()
    if rank == 0:
        group(folder, "one", 0, 1)
        found["one"] = {how: in_one(how, folder, found["fsdp2"]["whole after"]) for how in ("plain", "fsdp2")}
        found["trial in one"] = {how: trial_of_two(how, folder) for how in ("plain", "fsdp2")}
        dist.destroy_process_group()
    torch.save(found, Path(folder) / f"{rank}.pt")
