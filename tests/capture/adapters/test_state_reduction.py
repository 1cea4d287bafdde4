"""A smaller state in the layers of libraries and in our own: the operator is that without the dimensions left out."""

from __future__ import annotations

import dataclasses
import math
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.layers.case import Case
from ess_monitor.capture.hooks.changed_calls import ChangedCalls
from ess_monitor.ess import DeltaRecurrence, Operator
from ess_monitor.evidence.state_reduction import can_reduce, state_reduced
from ess_monitor.featurizers import LA
from tests.capture.adapters.helpers import captured_in, exact
from tests.capture.adapters.test_decay_power import ALL, Model, kind_of, own, quietly, raised_by_hand, relative
from tests.capture.adapters.test_pull import built

EVERY = (*ALL, own(LA, 24))
REDUCED = {
    *("LA", "WLA", "GLA", "GLAS6", "S6"),
    *("GatedLinearAttention", "HGRN2Attention", "SimpleGatedLinearAttention", "RWKV6Attention", "LinearAttention"),
    *("MultiScaleRetention", "DeltaNet", "GatedDeltaNet", "RWKV7Attention", "MiniMaxLightningAttention"),
    *("Qwen3NextGatedDeltaNet", "KimiLinearDeltaAttention"),
    *("MambaMixer", "mamba_ssm.Mamba", "Mamba2Mixer", "mamba_ssm.Mamba2"),
}
"""One layer class of each op that is known; others call the same ones."""
SLOW = {"DeltaNet", "MultiScaleRetention", "SimpleGatedLinearAttention"}
"""Their ops take the same arguments as others here."""
NORMALIZED = {"DeltaNet", "GatedDeltaNet", "Qwen3NextGatedDeltaNet", "KimiLinearDeltaAttention"}
"""Their ops norm the keys that are left."""
NOT_REDUCED = ("RecurrentGemmaRglru", "RwkvSelfAttention", "ZambaMambaMixer", "fla.Mamba2")


def case_of(kind: str) -> Case:
    return min(
        (case for case in EVERY if kind_of(case) == kind), key=lambda case: ("chunk" in case.note, len(case.note))
    )


def with_share(model: Model, share: float | None) -> tuple[Operator, Tensor, Tensor, ChangedCalls | None]:
    """Return the operator of one pass, y = T v of the library and of the operator, and the counts."""
    seen: list[Any] = []

    def keep(call: Any) -> None:
        if call.output is not None and not seen:
            seen.append(model.case.mixed(call))

    def forward() -> None:
        with torch.random.fork_rng(devices=()), quietly():
            torch.manual_seed(1)
            model.net(*model.args, **model.kwargs)

    reduced = nullcontext() if share is None else state_reduced(model.layer, share)
    with reduced as counts, torch.no_grad():
        watch = model.layer.spec.site.watch(model.layer.module, after=keep)
        try:
            taken = captured_in(model.net, forward)
        finally:
            watch.remove()
    [operator] = [item.operator for item in taken if item.layer.module is model.layer.module]
    [mixed] = seen
    return operator, mixed.y.double(), mixed.finish(exact(operator) @ mixed.u.double()), counts


def written(operator: Any) -> Tensor:
    """What writes to the state, (batch, heads, length, state)."""
    keys = operator.k if isinstance(operator, DeltaRecurrence) else operator.b
    return keys.double().expand(operator.batch, operator.heads, operator.length, operator.state_size)


def without(operator: Any, kept: Tensor, *, normalized: bool) -> Tensor:
    """T of the operator, token by token, with 0 in place of what writes to the dimensions that are not kept."""
    name = "k" if isinstance(operator, DeltaRecurrence) else "b"
    changed = {name: written(operator) * kept}
    if normalized:
        changed[name] = nn.functional.normalize(changed[name], dim=-1)
    if isinstance(operator, DeltaRecurrence) and operator.left is not None:
        changed["left"] = operator.left.double() * kept
    return raised_by_hand(dataclasses.replace(operator, **changed), 1.0)


@pytest.mark.parametrize("kind", sorted(REDUCED - SLOW))
def test_the_layer_applies_the_operator_without_the_dimensions_left_out(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(kind)
    model = Model(case, case.modes[0])
    if kind == "RWKV7Attention":
        kernels = sys.modules["fla.ops.generalized_delta_rule.dplr.chunk_A_fwd"]
        monkeypatch.setattr(kernels, "IS_GATHER_SUPPORTED", False)  # Triton's interpreter does not find it there
    before, y_before, _, _ = with_share(model, None)
    half, y, product, counts = with_share(model, 0.5)
    assert counts == ChangedCalls(calls=1)

    kept = written(half).abs().amax((0, 2)) > 0  # (heads, state)
    size = kept.shape[1]
    used = written(before).abs().amax((0, 2)) > 0
    assert torch.equal(kept.sum(-1), used.sum(-1).clamp(max=size - math.ceil(size / 2)))
    if kind == "LinearAttention":  # the sums of the rows, which every row is divided by
        before = dataclasses.replace(before, c=half.c)  # type: ignore[attr-defined]
    reference = without(before, kept[None, :, None].double(), normalized=kind in NORMALIZED)
    assert relative(exact(half), reference) < (1e-3 if kind in NORMALIZED else 2e-5)  # an epsilon in the norm
    assert relative(product, y) < case.tolerance
    assert relative(y, y_before) > 1e-4

    nothing, _, _, _ = with_share(model, 1.0)
    assert written(nothing).abs().max() == 0
    _, y_again, _, _ = with_share(model, None)
    assert torch.equal(y_again, y_before)


@pytest.mark.parametrize("kind", [*sorted(REDUCED), *NOT_REDUCED])
def test_what_can_be_made_smaller_is_said_before(kind: str) -> None:
    _, _, _, layers = built(case_of(kind))
    reason = can_reduce(layers[0])
    assert bool(reason) == (kind in NOT_REDUCED)
    if reason:
        assert reason == f"no argument of a call in {type(layers[0].module).__name__} holds its state dimensions"


def test_the_least_used_dimensions_are_left_out() -> None:
    """Usage is the root mean square of k times that of q, by head."""
    torch.manual_seed(0)
    layer = LA(8, 2, expand_k=1)
    model = nn.Sequential(layer)
    from ess_monitor.capture import find_layers

    [found] = find_layers(model)
    seen: list[tuple[Tensor, ...]] = []
    x = torch.randn(3, 16, 8)
    with torch.no_grad(), state_reduced(found, 0.25):
        hook = layer.core.register_forward_hook(lambda module, args, output: seen.append(args))
        model(x)
        hook.remove()
    with torch.no_grad():
        hook = layer.core.register_forward_hook(lambda module, args, output: seen.append(args))
        model(x)
        hook.remove()
    (q, k_reduced, *_), (_, k, *_) = seen
    usage = k.square().mean((0, 2)).sqrt() * q.square().mean((0, 2)).sqrt()
    left_out = (k_reduced == 0).all(0).all(1)
    assert torch.equal(left_out.sum(-1), torch.tensor([1, 1]))
    assert torch.equal(left_out.int().argmax(-1), usage.argmin(-1))
    assert torch.equal(k_reduced, k.masked_fill(left_out[None, :, None], 0.0))
