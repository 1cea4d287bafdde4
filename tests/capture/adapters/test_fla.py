"""What is special about the layers of flash-linear-attention: packing, caches, layers that only share an op."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.layers.fla import layer, op, rwkv6
from ess_monitor.capture import CaptureConfig, Captured, Sampler, find_layers, layer_infos
from ess_monitor.capture.adapters.delta_rule import delta_rule
from ess_monitor.capture.hooks.call_site import Call
from ess_monitor.ess import Operator

EVERYTHING = CaptureConfig(samples=2**31, heads=None, max_length=None, source="validation")
SMALL_RANKS = {f"{name}_low_rank_dim": 4 for name in ("decay", "gate", "a", "v")}

BASED = {"num_heads": 2, "num_key_value_heads": 2, "feature_dim": 4}


@pytest.fixture(autouse=True)
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library: no accelerator, old option names
        pytest.importorskip("fla")
        yield


def built(path: str, **settings: Any) -> nn.Module:
    model, _, _ = layer(path, 1, **settings)
    return model[1].eval()  # type: ignore[index, no-any-return]


def run(module: nn.Module, x: Tensor, **kwargs: Any) -> tuple[list[Operator], list[Call]]:
    """The operators captured in one forward pass, and the calls they are of."""
    layers, calls = find_layers(module), []
    sampler = Sampler(layers, EVERYTHING)
    sampler.arm()
    watch = layers[0].spec.site.watch(module, after=calls.append)
    with torch.no_grad():
        module(x, **kwargs)
    watch.remove()
    operators = []
    for item in sampler.collect():
        assert isinstance(item, Captured), item
        operators.append(item.operator)
    return operators, calls


def error(operator: Operator, call: Call) -> float:
    u, y, finish = rwkv6(call) if "u" in call.kwargs else op(call)
    product = finish(operator.map(Tensor.double).materialize() @ u.double())
    return ((product - y).abs().max() / y.abs().max()).item()


PACKED = {
    "gla.GatedLinearAttention": {"num_heads": 2, "expand_k": 1.0},
    "multiscale_retention.MultiScaleRetention": {"num_heads": 2, "width": 32},
    "linear_attn.LinearAttention": {"num_heads": 2, "feature_map": "elu", "do_feature_map_norm": True},
    "delta_net.DeltaNet": {"num_heads": 2},
    "gated_deltanet.GatedDeltaNet": {"num_heads": 2, "head_dim": 8},
    "kda.KimiDeltaAttention": {"num_heads": 2, "head_dim": 8},
}


@pytest.mark.parametrize("path", PACKED)
def test_padded_batches_are_packed_by_the_layer_and_give_a_block_diagonal_operator(path: str) -> None:
    module = built(path, **PACKED[path])
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, :3] = mask[2, :5] = 0
    [operator], [call] = run(module, torch.randn(3, 8, module.hidden_size), attention_mask=mask)
    assert operator.length == 5 + 8 + 3
    assert error(operator, call) < 1e-5
    T = operator.materialize()
    assert (T[..., 5:, :5] == 0).all()
    assert (T[..., 13:, :13] == 0).all()
    assert (operator.singular_values([5, 13]) == 0).all()


@pytest.mark.parametrize("path", ["rwkv6.RWKV6Attention", "rwkv7.RWKV7Attention"])
def test_sequences_packed_by_the_user_do_not_see_each_other(path: str) -> None:
    settings: dict[str, Any] = {"num_heads": 2, "expand_k": 1.0, "proj_low_rank_dim": 4, "gate_low_rank_dim": 4}
    if "rwkv7" in path:
        settings = {"head_dim": 8, "layer_idx": 0, "num_hidden_layers": 2, **SMALL_RANKS}
    module = built(path, **settings)
    [operator], [call] = run(module, torch.randn(1, 12, 16), cu_seqlens=torch.tensor([0, 5, 12]))
    assert error(operator, call) < 1e-5
    assert (operator.singular_values([5]) == 0).all()
    assert (operator.singular_values([4, 6])[..., 0] > 0).all()


def test_padding_that_stays_in_the_batch_carries_nothing() -> None:
    module = built("simple_gla.SimpleGatedLinearAttention", num_heads=2)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    [operator], [call] = run(module, torch.randn(2, 8, 16), attention_mask=mask)
    assert error(operator, call) < 1e-5
    assert (operator.singular_values([3])[0] == 0).all()
    assert (operator.singular_values([3])[1, :, 0] > 0).all()


@pytest.mark.parametrize("path", ["gla.GatedLinearAttention", "gated_deltanet.GatedDeltaNet"])
def test_steps_of_cached_decoding_are_not_taken_for_a_sequence(path: str) -> None:
    cache_class = importlib.import_module("fla.models.utils").Cache
    module = built(path, layer_idx=0, **PACKED[path])
    cache = cache_class()
    prompt, calls = run(module, torch.randn(1, 8, 16), past_key_values=cache, use_cache=True)
    assert (len(prompt), len(calls)) == (1, 1)
    for step in (1, 3):
        decoded, calls = run(module, torch.randn(1, step, 16), past_key_values=cache, use_cache=True)
        assert (len(decoded), len(calls)) == (0, 1)


@pytest.mark.parametrize(
    ("path", "settings", "capacity"),
    [
        ("yoco.YOCOGatedRetention", {"num_heads": 2}, 8),
        ("rodimus.RodimusAttention", {"expand_ratio": 8}, 8),
        ("based.BasedLinearAttention", {**BASED, "mode": "chunk"}, None),
    ],
)
def test_layers_without_an_entry_of_their_own_are_found_by_the_op_they_call(
    path: str, settings: dict[str, Any], capacity: int | None
) -> None:
    module = built(path, **settings)
    [info] = layer_infos(module)
    assert (info.supported, info.operator, info.state_capacity) == (True, "DiagonalRecurrence", capacity)
    [operator], [call] = run(module, torch.randn(2, 8, 16))
    assert error(operator, call) < 1e-5


@pytest.mark.parametrize(
    ("path", "settings", "reason"),
    [
        ("based.BasedLinearAttention", {**BASED, "mode": "parallel"}, "mode 'chunk'"),
        ("gated_deltaproduct.GatedDeltaProduct", {"num_heads": 2, "head_dim": 8}, "several steps"),
        ("mom.MomAttention", {"num_heads": 2, "head_dim": 8}, "several memories"),
    ],
)
def test_layers_that_feed_an_op_something_else_than_their_tokens_are_refused_with_the_reason(
    path: str, settings: dict[str, Any], reason: str
) -> None:
    [info] = layer_infos(built(path, **settings))
    assert not info.supported
    assert reason in info.reason


def test_the_chunked_delta_rule_is_read_like_the_recurrent_one() -> None:
    # The layer refuses float32 for this kernel, and in half precision the interpreter is wrong: so without the layer.
    chunk = importlib.import_module("fla.ops.delta_rule.chunk")
    built("delta_net.DeltaNet", num_heads=2)
    q, k, v = torch.randn(3, 1, 72, 2, 8)
    beta, scale = torch.rand(1, 72, 2), 8**-0.5
    y = chunk.ChunkDeltaRuleFunction.apply(q, k, v, beta, scale, None, False, True)[0]
    kwargs = {"q": q, "k": k, "v": v, "beta": beta, "use_qk_l2norm_in_kernel": True}
    lazy = delta_rule(Call(nn.Identity(), nn.Identity(), "chunk_delta_rule", kwargs=kwargs))
    assert lazy is not None
    operator = lazy.select(samples=slice(0, 1), heads=range(2), length=72)
    product = operator.map(Tensor.double).materialize() @ v.transpose(1, 2).double()
    torch.testing.assert_close(product, y.transpose(1, 2).double(), rtol=0, atol=1e-5 * y.abs().max().item())
