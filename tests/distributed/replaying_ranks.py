"""Processes under DDP, FSDP and FSDP2 whose monitors run batches again: what each of them runs, and what it saves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ess_monitor.interventions.gate import gate_tensors
from tests.evidence.ranks import within_group
from tests.pipeline.replaying import ALL_COLLAPSED, FULL, LAST, Loop, batch, by_outputs, loss_of, settings_of


def fsdp2(model: Any) -> Any:
    """Shard each block, and what is left."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.backbone.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp1(model: Any) -> Any:
    """Shard the model as a whole."""
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


WRAPS: dict[str, Callable[[Any], Any]] = {"ddp": DistributedDataParallel, "fsdp1": fsdp1, "fsdp2": fsdp2}


def bits(value: Any) -> Any:
    """What this rank holds of tensors in nested values, as text that can be compared and saved."""
    if isinstance(value, DTensor):
        value = value.to_local()
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.detach().contiguous().numpy().tobytes().hex()}"
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, (list, tuple)) else value


def training(loop: Loop) -> Any:
    """What this rank goes on from."""
    held = {**dict(loop.called.named_parameters()), **dict(loop.called.named_buffers())}
    states = [loop.optimizer.state[p] for group in loop.optimizer.param_groups for p in group["params"]]
    return bits({"held": held, "optimizer": states, "random": torch.get_rng_state()})


def told(loop: Loop) -> dict[str, Any]:
    """What was found and done."""
    monitor = loop.monitor
    assert monitor is not None
    health = monitor.snapshot().health
    return {
        "findings": [f.model_dump(mode="json") for f in monitor.findings],
        "evidence": [e.model_dump(mode="json") for e in [*loop.evidence, *loop.state_evidence]],
        "actions": [a.model_dump(mode="json") for a in monitor.actions],
        "conditions": dict(monitor.conditions),
        "failures": health.part_failures_total["replay"],
        "off": list(health.parts_off),
        "replays": monitor.snapshot().overhead_seconds["replay"].count,
        "hindered": dict(monitor._replays.obstacles),
    }


def gate_of(loop: Loop) -> Any:
    """What this rank holds of the treated layer's gate, and of the optimizer's memory of it."""
    assert loop.monitor is not None
    [layer] = [each for each in loop.monitor._context.layers if each.name.endswith(LAST)]
    tensors = gate_tensors(layer)
    return bits({name: (tensor, dict(loop.optimizer.state.get(tensor, {}))) for name, tensor in tensors.items()})


def run(rank: int, how: str, settings: Any, featurizer: str = "wla", steps: int = 11, **options: Any) -> dict[str, Any]:
    """A training of this rank, with what its monitor says, and the loss of its batches that are run again."""
    losses: list[float] = []
    gates: dict[int, Any] = {}

    def observe(loop: Loop) -> None:
        if loop.monitor is not None and loop.step in (10, 18):
            gates[loop.step] = gate_of(loop)
        if how == "ddp" and loop.monitor is not None and loop.monitor.replay_due:
            with torch.random.fork_rng([]), torch.no_grad():
                losses.append(loss_of(copy.deepcopy(loop.model), batch(loop.step - 1, rank)).item())

    loop = Loop(settings, featurizer=featurizer, rank=rank, wrap=WRAPS[how], every_step=observe, **options)
    loop.run(min(steps, 18))
    back = gate_of(loop) if loop.monitor is not None else None
    loop.run(max(0, steps - 18))
    if loop.monitor is None:
        return {"training": training(loop)}
    found = {"training": training(loop), **told(loop), "losses": losses, "gates": gates, "back": back}
    loop.monitor.close()
    return found


def nan_on_rank_1(loop: Loop, tokens: Tensor) -> Callable[[], Any]:
    """A loss that is not finite on one rank."""
    return lambda: loss_of(loop.called, tokens) * (math.nan if loop.rank == 1 else 1.0)


def under_ddp(rank: int, folder: str, count: int) -> None:
    """All ranks measure; rank 0 alone does; all act."""

    def work(rank: int) -> dict[str, Any]:
        collapsed = {**ALL_COLLAPSED, "batches": 2}
        return {
            "bare": run(rank, "ddp", None),
            "all": run(rank, "ddp", settings_of("advise", ranks="all")),
            "all by outputs": run(rank, "ddp", settings_of("advise", ranks="all"), replays=by_outputs),
            "full": run(rank, "ddp", settings_of("advise", ranks="all", diagnosis=FULL)),
            "alone": run(rank, "ddp", settings_of("advise")),
            "alone by outputs": run(rank, "ddp", settings_of("advise"), replays=by_outputs),
            "auto": run(rank, "ddp", settings_of("auto", evidence=collapsed), steps=20),
            "auto, rank 0 measures": run(rank, "ddp", settings_of("auto", evidence=collapsed, ranks="zero"), steps=20),
            "nan": run(rank, "ddp", settings_of("auto", evidence={"batches": 6}), steps=20, replays=nan_on_rank_1),
        }

    within_group(rank, folder, count, work)


def sharded(rank: int, folder: str, count: int, how: str) -> None:
    """All act, and take back what they did; rank 0 alone measures; one rank has no usable loss."""

    def work(rank: int) -> dict[str, Any]:
        taken_back = {"checks": (4,), "harm_ratio": 0.0, "noise": 0.0, "silent_patience_steps": 5}
        acting = settings_of("auto", evidence={**ALL_COLLAPSED, "batches": 2}, probation=taken_back)
        silent = settings_of("advise", diagnosis={"metric": None, "metric_solved": None})
        return {
            "bare": run(rank, how, None),
            "all": run(rank, how, settings_of("advise", ranks="all")),
            "all by outputs": run(rank, how, settings_of("advise", ranks="all"), replays=by_outputs),
            "alone": run(rank, how, settings_of("advise")),
            "alone without a metric": run(rank, how, silent),
            "wla": run(rank, how, acting, steps=20),
            "s6": run(rank, how, acting, "s6", steps=20),
            "nan": run(rank, how, settings_of("auto", evidence={"batches": 6}), steps=20, replays=nan_on_rank_1),
        }

    within_group(rank, folder, count, work)
