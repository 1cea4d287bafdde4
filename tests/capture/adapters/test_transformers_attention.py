"""What is special about softmax attention: masks, windows, packed batches, cached decoding, what is not causal."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.layers import attention
from benchmarks.layers.attention import PADDING, TOKENS, CausalSelfAttention, MaskedEncoder, hf
from benchmarks.layers.case import Case
from ess_monitor.capture import (
    CaptureConfig,
    Captured,
    CaptureFailure,
    Sampler,
    capture_operators,
    find_layers,
    layer_infos,
)
from ess_monitor.capture.adapters.transformers_attention import read_interface
from ess_monitor.capture.hooks.call_site import Call
from ess_monitor.errors import CaptureError
from ess_monitor.ess import Operator, SoftmaxAttention, tolerance_ess

EVERYTHING = CaptureConfig(samples=2**31, heads=None, max_length=None, source="validation")


@pytest.fixture(autouse=True)
def _library() -> None:
    pytest.importorskip("transformers")


def built(case: Case) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    with torch.random.fork_rng(devices=()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library, about its own options
        torch.manual_seed(0)
        return case.build()


def output(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    torch.manual_seed(1)
    found = model(*args, **kwargs)
    first: Tensor = getattr(found, "logits", found)
    return first


def captured(model: nn.Module, *args: Any, **kwargs: Any) -> list[Captured | CaptureFailure]:
    """What one forward pass gives, failures included."""
    sampler = Sampler(find_layers(model), EVERYTHING)
    sampler.arm()
    try:
        with torch.no_grad():
            model.eval()(*args, **kwargs)
    finally:
        taken = sampler.collect()
    return list(taken)


def reasons(model: nn.Module) -> dict[str, str]:
    return {info.module: info.reason for info in layer_infos(model) if not info.supported}


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in attention.CASES])
def test_a_watched_model_computes_the_same_to_the_last_bit_and_is_left_as_it_was(case: Case) -> None:
    model, args, kwargs = built(case)
    layers = [layer for layer in find_layers(model) if type(layer.module).__name__ == case.layer]
    namespaces = [vars(F)] + [vars(sys.modules[type(layer.module).__module__]) for layer in layers]
    before = output(model.train(), args, kwargs)
    names = [dict(namespace) for namespace in namespaces]
    sampler = Sampler(tuple(layers), EVERYTHING)
    sampler.arm()
    watched = output(model, args, kwargs)
    assert len(sampler.collect()) == len(layers) > 0
    assert torch.equal(watched, before)
    for namespace, original in zip(namespaces, names, strict=True):
        assert namespace.keys() == original.keys()
        assert all(namespace[name] is value for name, value in original.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_a_model_of_transformers_is_read_once_per_layer_and_nothing_around_it_is_taken_for_one(kernel: str) -> None:
    model, args, kwargs = hf("Llama", kernel)()
    infos = layer_infos(model)
    assert [info.name for info in infos] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all(info.supported and info.capacity_grows and info.state_capacity is None for info in infos)
    assert len(captured(model, *args, **kwargs)) == 2


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_a_window_bounds_the_size_and_padding_is_no_memory(kernel: str) -> None:
    model, args, kwargs = hf("Mistral", kernel, sliding_window=6)()
    for operator in capture_operators(model, *args, **kwargs).values():
        sizes = tolerance_ess(operator.singular_values(range(1, 24)), 1e-12)
        assert sizes.max() == 5
        assert (sizes[0, :, :5] == 0).all(), "everything before the first token is padding"
        assert (operator.materialize()[0, :, :5] == 0).all()


def test_a_soft_cap_and_sinks_change_the_operator() -> None:
    """So that the agreement of T u with the layers means something."""
    model, args, kwargs = hf("Gemma2", "eager", attn_logit_softcapping=2.0)()
    for operator in capture_operators(model, *args, **kwargs).values():
        assert isinstance(operator, SoftmaxAttention)
        assert operator.softcap == 2.0
        without = SoftmaxAttention(operator.q, operator.k, operator.scale, operator.mask)
        assert (operator.materialize() - without.materialize()).abs().max() > 0.01
    model, args, kwargs = hf("GptOss", "eager", num_local_experts=2, num_experts_per_tok=1, head_dim=8)()
    for operator in capture_operators(model, *args, **kwargs).values():
        assert operator.materialize()[1].sum(-1).min() < 0.9


def test_the_position_bias_of_a_decoder_is_part_of_the_operator() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    described = {info.name: info for info in layer_infos(model)}
    assert [name for name, info in described.items() if info.supported] == ["decoder.block.0.layer.0.SelfAttention"]
    skipped = {name: info.reason for name, info in described.items() if not info.supported}
    assert all("not causal (is_causal=False)" in reason for reason in skipped.values())
    assert skipped.keys() == {"encoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.1.EncDecAttention"}
    [layer] = find_layers(model)
    seen: list[Call] = []
    watch = layer.spec.site.watch(layer.module, after=seen.append)
    [operator] = capture_operators(model, TOKENS[0], decoder_input_ids=TOKENS[0]).values()
    watch.remove()
    [call] = seen
    assert call.kwargs["position_bias"].abs().max() > 0
    y = call.output[0].transpose(1, 2)
    torch.testing.assert_close(
        operator.materialize() @ call.kwargs["value"], y, rtol=0, atol=1e-6 * y.abs().max().item()
    )


# Decoding


def test_steps_of_cached_decoding_are_no_operators_of_a_sequence() -> None:
    model, (tokens,), _ = hf("Llama", "sdpa")()
    with torch.no_grad():
        cache = model(tokens[:, :-1], use_cache=True).past_key_values
    assert captured(model, tokens[:, -1:], past_key_values=cache) == []
    assert captured(model, tokens[:, :1]) == []
    sampler = Sampler(find_layers(model), EVERYTHING)
    sampler.arm()
    model.generate(tokens, max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    taken = sampler.collect()
    assert [item.operator.length for item in taken if isinstance(item, Captured)] == [24, 24]


# Refusals


def test_layers_that_are_not_causal_are_skipped_with_the_reason() -> None:
    from transformers import BertConfig, BertModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    [reason] = reasons(BertModel(BertConfig(vocab_size=32, **small))).values()
    assert reason == "not causal (is_causal=False): T is not lower triangular, so ESS is not defined for it"
    decoder = BertModel(BertConfig(vocab_size=32, is_decoder=True, **small))
    assert [layer.spec.operator for layer in find_layers(decoder)] == ["SoftmaxAttention"]


def test_layers_whose_operator_is_something_else_are_skipped_with_the_reason() -> None:
    model, _, _ = hf("DiffLlama", "sdpa")()
    assert set(reasons(model)) == {"DiffLlamaAttention"}
    assert "difference of two softmax maps" in reasons(model)["DiffLlamaAttention"]
    model, _, _ = hf("Falcon", "eager")()
    assert "attn_implementation='sdpa'" in reasons(model)["FalconAttention"]
    model, _, _ = hf("GPT2", "eager", reorder_and_upcast_attn=True)()
    assert "attn_implementation='sdpa'" in reasons(model)["GPT2Attention"]
    assert "no token" in reasons(nn.MultiheadAttention(8, 2, add_zero_attn=True))["MultiheadAttention"]


@pytest.mark.parametrize("name", ["Bloom", "GPTJ", "Mpt"])
def test_attention_that_computes_its_softmax_by_itself_is_named_and_can_be_taught(name: str) -> None:
    model, _, _ = hf(name, "eager", rotary_dim=4)()
    assert "register_capture" in reasons(model)[f"{name}Attention"]


# torch's own


def test_attention_inside_of_a_transformer_encoder_is_read_on_its_fast_path_with_padding() -> None:
    torch.manual_seed(0)
    model = MaskedEncoder(batch_first=True).eval()
    x = 3 * torch.randn(2, 24, 32)
    with torch.no_grad():
        operators = capture_operators(model, x)
    assert list(operators) == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]

    layer = model.encoder.layers[0]
    mask = torch.ones(24, 24, dtype=torch.bool).triu(1)
    [operator] = capture_operators(layer, x, src_mask=mask, src_key_padding_mask=PADDING == 0).values()
    T = operator.materialize()
    assert (T[0, :, :, :5] == 0).all()
    assert (T[0, :, :5] == 0).all()
    torch.testing.assert_close(T[1], operators["encoder.layers.0.self_attn"].materialize()[1])


class _Imported(nn.Module):
    """Has the function under a name of its own module."""

    def forward(self, q: Tensor, k: Tensor, **options: Any) -> Tensor:
        return scaled_dot_product_attention(q, k, k, **options)


def test_a_function_imported_by_name_is_read_with_every_way_to_say_causal() -> None:
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    bias = torch.randn(1, 4, 9, 9).masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -1e9)
    ways: list[dict[str, Any]] = [
        {"is_causal": True},
        {"is_causal": True, "scale": 0.1},
        {"attn_mask": torch.ones(9, 9, dtype=torch.bool).tril()},
        {"attn_mask": bias},
    ]
    for options in ways:
        [operator] = capture_operators(_Imported(), q, k, **options).values()
        torch.testing.assert_close(operator.materialize() @ k, scaled_dot_product_attention(q, k, k, **options))
    [folded] = capture_operators(_Imported(), q[:, 0], k[:, 0], is_causal=True).values()
    assert (folded.batch, folded.heads) == (2, 1)


def test_calls_that_see_later_tokens_fail_with_the_reason() -> None:
    x = torch.randn(2, 9, 32)
    q = torch.randn(2, 4, 9, 8)
    later = torch.ones(9, 9, dtype=torch.bool).tril(1)
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], str]] = [
        (_Imported(), (q, q), {}, "without a mask and without is_causal=True"),
        (_Imported(), (q, q), {"attn_mask": later}, "lets tokens attend to later ones"),
        (_Imported(), (q, q), {"attn_mask": torch.zeros(1, 1, 1, 9)}, "lets tokens attend to later ones"),
        (nn.MultiheadAttention(32, 4, batch_first=True), (x, x, x), {}, "without an attn_mask"),
        (nn.MultiheadAttention(32, 4, batch_first=True), (x, x, x), {"attn_mask": ~later}, "attend to later ones"),
        (nn.MultiheadAttention(32, 4, batch_first=True), (x, x[:, :5], x[:, :5]), {}, "cross attention"),
    ]
    for model, args, kwargs, reason in calls:
        [failure] = captured(model, *args, **kwargs)
        assert isinstance(failure, CaptureFailure)
        assert failure.status == "skipped"
        assert reason in failure.error


def test_a_prefix_that_is_seen_as_a_whole_is_not_causal() -> None:
    """Models with images or prompts may let a part of the sequence see all of itself."""
    model, (tokens,), _ = hf("Llama", "sdpa")()
    mask = torch.ones(24, 24, dtype=torch.bool).tril()
    mask[:4, :4] = True
    failures = captured(model, tokens, attention_mask=mask.expand(2, 1, 24, 24))
    assert all(isinstance(item, CaptureFailure) and "attend to later ones" in item.error for item in failures)
    assert len(failures) == 2


@pytest.mark.parametrize("same_width", [True, False])
def test_a_module_with_keys_of_another_width_or_one_sequence_is_read(same_width: bool) -> None:
    width = 32 if same_width else 16
    mha = nn.MultiheadAttention(32, 4, kdim=width, vdim=width, bias=same_width, batch_first=True)
    query, key = torch.randn(9, 32), torch.randn(9, width)
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1)
    _, weights = mha(query, key, key, attn_mask=mask, average_attn_weights=False)
    [operator] = capture_operators(mha, query, key, key, attn_mask=mask).values()
    torch.testing.assert_close(operator.materialize()[0], weights)


def test_one_mask_for_every_head_is_read() -> None:
    mha = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 9, 32)
    hidden = torch.rand(8, 9, 9).triu(1).bool() | (torch.rand(8, 9, 9) < 0.3).tril(-1)
    _, weights = mha(x, x, x, attn_mask=hidden, average_attn_weights=False)
    [operator] = capture_operators(mha, x, x, x, attn_mask=hidden).values()
    torch.testing.assert_close(operator.materialize(), weights)
    few = operator.select(heads=[1, 3], length=5)
    torch.testing.assert_close(few.materialize(), weights[:, 1::2, :5, :5])


def test_the_head_count_of_a_layer_of_ones_own_is_known_before_a_forward_pass() -> None:
    [info] = layer_infos(CausalSelfAttention(32, 4, 2, masked=False))
    assert (info.operator, info.channels, info.capacity_grows) == ("SoftmaxAttention", 4, True)


# Kernels that need an accelerator: their arguments, read without them


class _Flash(nn.Module):
    is_causal = True

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"_attn_implementation": "flash_attention_2"})()


def _read(q: Tensor, mask: Any, layer: nn.Module | None = None, **options: Any) -> Operator:
    layer = layer or _Flash()
    given = {"module": layer, "query": q, "key": q, "value": q, "attention_mask": mask, "scaling": 1.0, **options}
    sketch = read_interface(Call(layer, layer, "ALL_ATTENTION_FUNCTIONS", kwargs=given))
    assert sketch is not None
    return sketch.select(samples=slice(0, 2), heads=range(sketch.heads), length=sketch.length)


def test_a_flash_kernel_is_told_padding_window_and_packing_as_options() -> None:
    q = torch.randn(2, 3, 12, 4, dtype=torch.float64)
    position = torch.arange(12)
    lag = position[:, None] - position
    real = torch.ones(2, 12, dtype=torch.long)
    real[0, :3] = 0
    real[1, -2:] = 0
    seen = (real[:, :, None] * real[:, None, :]).bool()[:, None]
    expected = SoftmaxAttention(q, q, 1.0, seen & (lag < 4))
    found = _read(q, real, sliding_window=4)
    torch.testing.assert_close(found.materialize(), expected.materialize())
    assert (found.materialize()[1, :, -2:] == 0).all()

    segment = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
    expected = SoftmaxAttention(q[:1], q[:1], 1.0, segment[:, None] == segment)
    ends = torch.tensor([0, 5, 9, 12], dtype=torch.int32)
    torch.testing.assert_close(_read(q[:1], None, cu_seq_lens_q=ends).materialize(), expected.materialize())
    positions = torch.cat([torch.arange(n) for n in (5, 4, 3)])[None]
    torch.testing.assert_close(_read(q[:1], None, position_ids=positions).materialize(), expected.materialize())
    torch.testing.assert_close(
        _read(q, None, position_ids=position[None]).materialize(), SoftmaxAttention(q, q, 1.0).materialize()
    )


def test_the_mask_of_flex_attention_is_read_from_its_function() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    start = torch.tensor([3, 0])

    def keep(sample: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (column >= start[sample])

    layer = _Flash()
    layer.config._attn_implementation = "flex_attention"
    q = torch.randn(2, 3, 12, 4, dtype=torch.float64)
    block_mask = create_block_mask(keep, 2, None, 12, 12, device="cpu")
    position = torch.arange(12)
    expected = SoftmaxAttention(q, q, 1.0, (position >= start[:, None])[:, None, None])
    torch.testing.assert_close(_read(q, block_mask, layer).materialize(), expected.materialize())


def test_what_no_operator_can_be_made_of_says_so() -> None:
    q = torch.randn(1, 2, 6, 4)
    with pytest.raises(CaptureError, match="sparse kernel"):
        _read(q, None, indices=torch.zeros(1))
    layer = _Flash()
    given = {"module": layer, "query": q, "key": q, "value": q, "attention_mask": None}
    with pytest.raises(CaptureError, match="cross attention"):
        read_interface(Call(layer, layer, kwargs=given, layer_kwargs={"encoder_hidden_states": q}))
    layer.config._attn_implementation = "eager"
    with pytest.raises(CaptureError, match="without a mask"):
        _read(q, None, layer)
