"""Compares injected gradients of the A->I regularizer with those of adding it to the loss, and tests its norm.

The injected gradient (`IdentityPull`) does not change the loss. It must still equal that of loss + lambda R for every
parameter, in every way of training. The reference adds lambda R to the loss, in one process, without checkpointing.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from benchmarks.report import Result, main
from ess_monitor.capture import find_layers
from ess_monitor.featurizers import Backbone, BackboneConfig, build_mixer
from ess_monitor.interventions import IdentityPull, collect_penalties

FEATURIZERS: dict[str, dict[str, int | float]] = {
    "wla": {"beta": 1.0},
    "gla": {"beta": 1.0},
    "s6": {},
    "gla_s6": {"alpha": 1.0},
}
"""Options with decays that collapse: far from the identity, so that the regularizer has an effect."""
STRENGTH, LIMIT = 0.5, 1e-5
VOCABULARY, WIDTH, STATE, BATCH, LENGTH = 64, 32, 16, 8, 32
REGULARIZED = "blocks.1.mixer"
ACCUMULATED, LOSS_SCALE, RANKS = 3, 1024.0, 2

Gradients = dict[str, Tensor]


def model_of(featurizer: str) -> Backbone:
    """Build two blocks. The second is regularized, so that all parameters below it affect its decay."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "width": WIDTH, "state_size": STATE}
    model = Backbone(BackboneConfig(featurizer=featurizer, mixer_options=FEATURIZERS[featurizer], **sizes))
    nn.init.normal_(model.embedding.weight)  # as large as after training, so that the tokens affect the decay
    return model


def task(model: nn.Module, seed: int = 0) -> Tensor:
    """Return the cross-entropy on random tokens."""
    tokens, targets = torch.randint(VOCABULARY, (2, BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def added(model: nn.Module, seed: int = 0) -> Tensor:
    """Return loss + lambda R."""
    with collect_penalties(model, REGULARIZED) as penalties:
        loss = task(model, seed)
    return loss + STRENGTH * penalties.total()


def attach(model: nn.Module, scale: float = 1.0) -> None:
    """Attach the regularizer as the autopilot does."""
    layer = find_layers(model)[1]
    assert layer.spec.decay is not None
    IdentityPull(layer.module, layer.spec.decay, STRENGTH, grad_scale=lambda: scale).attach()


def taken(model: nn.Module) -> Gradients:
    """Return the gradients, and remove them from the model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def difference(found: Gradients, expected: Gradients) -> tuple[float, str]:
    """Return max over parameters of ||found - expected|| / ||expected|| (NaN if one is) and the parameter."""
    assert list(found) == list(expected)
    relative = torch.stack([(found[name] - e).double().norm() / e.double().norm() for name, e in expected.items()])
    largest, index = relative.max(0)
    return largest.item(), list(expected)[int(index)] if largest else ""


# -- ways of training: each returns the injected and the expected gradients --------------------------------------------


def plain(featurizer: str) -> tuple[Gradients, Gradients]:
    model = model_of(featurizer)
    added(model).backward()
    expected = taken(model)
    attach(model)
    task(model).backward()
    return taken(model), expected


def accumulation(featurizer: str) -> tuple[Gradients, Gradients]:
    model = model_of(featurizer)
    sum(added(model, seed) / ACCUMULATED for seed in range(ACCUMULATED)).backward()
    expected = taken(model)
    attach(model, 1 / ACCUMULATED)
    for seed in range(ACCUMULATED):
        (task(model, seed) / ACCUMULATED).backward()
    return taken(model), expected


def loss_scaling(featurizer: str) -> tuple[Gradients, Gradients]:
    model = model_of(featurizer)
    (LOSS_SCALE * added(model)).backward()
    expected = taken(model)
    attach(model, LOSS_SCALE)
    (LOSS_SCALE * task(model)).backward()
    return taken(model), expected


def autocast(featurizer: str) -> tuple[Gradients, Gradients]:
    model = model_of(featurizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reference = added(model)
    reference.backward()
    expected = taken(model)
    attach(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task(model)
    loss.backward()
    return taken(model), expected


class Checkpointed(nn.Module):
    """A mixer whose forward pass is computed again in the backward pass."""

    def __init__(self, mixer: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.mixer, self.use_reentrant = mixer, use_reentrant

    def forward(self, features: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        return checkpoint(self.mixer, features, use_reentrant=self.use_reentrant)


def checkpointed(use_reentrant: bool) -> Callable[[str], tuple[Gradients, Gradients]]:
    def run(featurizer: str) -> tuple[Gradients, Gradients]:
        model = model_of(featurizer)
        added(model).backward()
        expected = taken(model)
        attach(model)
        for block in model.blocks:
            block.mixer = Checkpointed(block.mixer, use_reentrant)
        task(model).backward()
        return {name.replace("mixer.mixer.", "mixer."): grad for name, grad in taken(model).items()}, expected

    return run


def rank_of_ddp(rank: int, folder: str) -> None:
    """Run one process of `ddp`: every featurizer on this rank's own data."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rendezvous = (Path(folder) / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    found = {}
    for featurizer in FEATURIZERS:
        model = model_of(featurizer)
        wrapped = DistributedDataParallel(model)
        attach(wrapped)
        task(wrapped, seed=rank).backward()
        found[featurizer] = taken(model)
    if rank == 0:
        torch.save(found, Path(folder) / "gradients.pt")
    del wrapped
    dist.barrier()  # a rank can abort if the other one exits while they still communicate
    dist.destroy_process_group()


@cache
def gradients_of_ddp() -> dict[str, Gradients]:
    """Return the gradients of every featurizer. The processes are started only once."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_of_ddp, args=(folder,), nprocs=RANKS)
        found: dict[str, Gradients] = torch.load(Path(folder) / "gradients.pt")
    return found


def ddp(featurizer: str) -> tuple[Gradients, Gradients]:
    model = model_of(featurizer)
    sum(added(model, seed) / RANKS for seed in range(RANKS)).backward()
    return gradients_of_ddp()[featurizer], taken(model)


SITUATIONS: dict[str, Callable[[str], tuple[Gradients, Gradients]]] = {
    "plain": plain,
    f"{ACCUMULATED} batches accumulated": accumulation,
    f"loss scale {LOSS_SCALE:g}": loss_scaling,
    "autocast bf16": autocast,
    "checkpoint, non-reentrant": checkpointed(use_reentrant=False),
    "checkpoint, reentrant": checkpointed(use_reentrant=True),
    f"DDP, {RANKS} processes": ddp,
}


def run() -> Result:
    """Compare the gradients of every featurizer in every situation."""
    rows, failures = [], []
    for featurizer in FEATURIZERS:
        precise = plain(featurizer)[1]
        model = model_of(featurizer)
        task(model).backward()
        missing, _ = difference(taken(model), precise)
        for situation, gradients_of in SITUATIONS.items():
            found, expected = gradients_of(featurizer)
            largest, where = difference(found, expected)
            limit = difference(expected, precise)[0] if gradients_of is autocast else LIMIT
            rows.append(
                {
                    "featurizer": featurizer,
                    "situation": situation,
                    "largest difference": largest,
                    "limit": limit,
                    "at": where,
                    "without regularizer": missing,
                }
            )
            if not largest < limit:
                failures.append(f"{featurizer}, {situation}: {largest:.1e} at {where}, limit {limit:.1e}")
    notes = [
        "largest difference: max over parameters of ||injected - added|| / ||added||; float32, lambda 0.5 on the",
        "second of two layers. Limit of bf16: its noise, i.e. added in bf16 against added in float32.",
        "without regularizer: the loss alone against loss + lambda R, the figure of a regularizer without effect.",
    ]
    return Result("Injected gradients against those of loss + lambda R", rows, notes, failures)


# -- the definition of the norm ---------------------------------------------------------------------------------------

SHAPES = ((8, 32), (64, 32), (8, 128), (64, 128))
STEADY = 0.1


def over_everything(log_decay: Tensor) -> Tensor:
    """Return one Frobenius norm over all axes."""
    return torch.expm1(log_decay).norm()


def definition() -> Result:
    """Compute R and its gradient's norm at several batch sizes and lengths, relative to the first."""
    rows: list[dict[str, Any]] = []
    failures = []
    for featurizer in FEATURIZERS:
        if featurizer == "wla":
            continue  # it has one A for all positions, so there is no mean
        first: list[float] = []
        for batch, length in SHAPES:
            figures = norms(featurizer, batch, length)
            first = first or figures
            ratios = [figure / start for figure, start in zip(figures, first, strict=True)]
            size = (batch * length / (SHAPES[0][0] * SHAPES[0][1])) ** 0.5
            names = ("R", "gradient of R", "||A - I|| over all", "its gradient")
            rows.append(
                {"featurizer": featurizer, "batch": batch, "length": length}
                | dict(zip(names, ratios, strict=True))
                | {"sqrt(batch length)": size}
            )
            for name, ratio, expected in zip(names, ratios, (1.0, 1.0, size, size), strict=True):
                if abs(ratio / expected - 1) > STEADY:
                    failures.append(f"{featurizer}, {batch} x {length}: {name} is {ratio:.2f} times the first")
    notes = [
        "R: mean over batch and positions of ||A_t - I||_F. All figures relative to the first shape of a featurizer,",
        "on Gaussian features; gradients over all parameters of the layer. One lambda fits every shape only with R.",
    ]
    return Result("The norm's definition: a mean does not grow with the batch", rows, notes, failures)


def norms(featurizer: str, batch: int, length: int) -> list[float]:
    """Return R and its gradient's norm, and the same for the Frobenius norm over all axes."""
    torch.manual_seed(0)
    mixer = build_mixer(featurizer, WIDTH, 2, STATE, **FEATURIZERS[featurizer])
    seen: list[Tensor] = []
    mixer.get_submodule("core").register_forward_pre_hook(lambda _, args: seen.append(args[3]))
    with collect_penalties(mixer) as penalties:
        mixer(torch.randn(batch, length, WIDTH))
    figures = []
    for value in (penalties.total(), over_everything(seen[0])):
        gradients = torch.autograd.grad(value, list(mixer.parameters()), retain_graph=True, allow_unused=True)
        norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
        figures += [value.item(), norm.item()]
    return figures


if __name__ == "__main__":
    sys.exit(main([run, definition], __doc__))
