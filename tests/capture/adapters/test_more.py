"""What is special about gated delta rules of transformers, RG-LRU, lightning attention, RWKV-4 and convolutions."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.layers import convolutions, delta, recurrent
from ess_monitor import capture_operators, describe
from ess_monitor.capture import AlphaHandle, CaptureConfig, Captured, Sampler, find_layers
from ess_monitor.ess import DeltaRecurrence, DenseOperator, Operator
from ess_monitor.interventions import IdentityPull

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "layer_types": ["linear_attention", "linear_attention"]}
GATED_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 4,
}


def built(build: Any) -> Built:
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library, about its own options
        return build()


def captured(model: nn.Module, *args: Any, **kwargs: Any) -> list[Operator]:
    """One operator per layer that was read, in one pass; none for layers that were not."""
    sampler = Sampler(find_layers(model), CaptureConfig(samples=99, heads=None, max_length=None, source="validation"))
    sampler.arm()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(*args, **kwargs)
    taken = sampler.collect()
    assert all(isinstance(item, Captured) for item in taken), taken
    return [item.operator for item in taken if isinstance(item, Captured)]


def of_layer(model: nn.Module, name: str, *args: Any, **kwargs: Any) -> Operator:
    names = [layer.name for layer in find_layers(model)]
    return captured(model, *args, **kwargs)[names.index(name)]


# gated delta rule


@pytest.mark.parametrize(
    ("module", "layer", "config", "special", "scaled"),
    [
        ("qwen3_5_moe", "Qwen3_5MoeGatedDeltaNet", "Qwen3_5MoeTextConfig", GATED_DELTA, "A_log"),
        ("qwen4_exp", "Qwen4ExpTextGatedDeltaNet", "Qwen4ExpTextConfig", GATED_DELTA, "A_log"),
        (
            "glm5_next",
            "Glm5NextTextLinearAttention",
            "Glm5NextTextConfig",
            {"linear_head_dim": 8, "linear_num_heads": 4},
            "",
        ),
        (
            "glm5_next",
            "Glm5NextTextLinearAttention",
            "Glm5NextTextConfig",
            {"linear_head_dim": 8, "linear_num_heads": 4, "linear_lower_bound": None},
            "forget_gate.A_log",
        ),
        (
            "bailing_hybrid",
            "BailingHybridDeltaAttention",
            "BailingHybridConfig",
            {"head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 4},
            "",
        ),
    ],
)
def test_model_files_without_an_entry_of_their_own_are_found_by_the_name_of_their_op(
    module: str, layer: str, config: str, special: dict[str, Any], scaled: str
) -> None:
    transformers = pytest.importorskip("transformers")
    found = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    mixer = getattr(found, layer)(getattr(transformers, config)(**SMALL, **special), layer_idx=0)
    [info] = describe(mixer).layers
    assert info.supported
    assert info.operator == "DeltaRecurrence"
    assert (info.state_capacity, info.channels, info.uninformative) == (8, 4, "")
    decay, *alpha = info.handles
    names = decay.removeprefix("decay: ").split(", ")
    assert {name for name, _ in mixer.named_parameters() if name.startswith(tuple(names))}
    assert {"A_log", "forget_gate"} & set(names)
    # With a lower bound A_log stands inside a sigmoid, and scales nothing.
    assert alpha == ([f"alpha: {scaled}"] if scaled else [])


@pytest.mark.parametrize("name", ["Qwen3NextGatedDeltaNet", "KimiLinearDeltaAttention"])
def test_padding_on_the_left_is_in_no_column_of_a_delta_rule(name: str) -> None:
    [case] = [case for case in delta.CASES if case.layer == name]
    model, args, kwargs = built(case.build)
    for operator in captured(model.eval(), *args, **kwargs):
        columns = operator.materialize()[0].abs().sum((0, 1))
        assert (columns[:5] == 0).all()
        assert (columns[5:] > 0).all()


def test_a_step_of_cached_decoding_is_not_taken_for_a_sequence() -> None:
    [case] = [case for case in delta.CASES if case.layer == "OlmoHybridGatedDeltaNet"]
    model, (tokens,), _ = built(case.build)
    model.eval()

    def delta_rules(**kwargs: Any) -> int:
        return sum(isinstance(operator, DeltaRecurrence) for operator in captured(model, use_cache=True, **kwargs))

    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    assert delta_rules(input_ids=tokens[:, :1], past_key_values=cache) == 0
    assert delta_rules(input_ids=tokens) == 2  # the prompt is one


# RG-LRU


def test_an_rg_lru_forgets_everything_where_a_document_begins() -> None:
    model, args, kwargs = built(recurrent.recurrent_gemma)
    T = of_layer(model.eval(), "model.layers.0.temporal_block.rg_lru", *args, **kwargs).materialize()
    assert (T[0].tril().abs().sum((0, 2))[1:] > 0).all()
    assert (T[1, :, 14:, :14] == 0).all()
    assert (T[0, :, 14:, :14] != 0).any()


def test_the_pull_leaves_the_outputs_of_an_rg_lru_as_they_are_bit_for_bit() -> None:
    model, args, kwargs = built(recurrent.recurrent_gemma)
    model.train()
    layer = next(layer for layer in find_layers(model) if layer.spec.decay is not None)
    before = model(*args, **kwargs).logits
    pull = IdentityPull(layer.module, layer.spec.decay, strength=0.5)
    pull.attach()
    assert torch.equal(model(*args, **kwargs).logits, before)
    pull.detach()


def test_the_pull_reaches_parameters_that_an_rg_lru_uses_by_itself_even_if_its_input_needs_no_gradient() -> None:
    model, _, kwargs = built(recurrent.recurrent_gemma)
    layer = next(layer for layer in find_layers(model) if layer.spec.decay is not None)
    rg_lru, x, positions = layer.module.train(), torch.randn(2, 24, 16), kwargs["position_ids"]
    pull = IdentityPull(rg_lru, layer.spec.decay, strength=0.5)
    pull.attach()
    (rg_lru(activations=x, position_ids=positions) * 0).sum().backward()
    pulled = {name for name, p in rg_lru.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert pulled == set(layer.spec.decay.parameters)
    pull.detach()


@pytest.mark.parametrize("factor", [0.25, 8.0, 1e4])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_rate_that_is_a_softplus_is_divided_exactly(factor: float, sign: float) -> None:
    before = torch.linspace(-12, 30, 43, dtype=torch.float64)
    after = AlphaHandle("t", sign, form="softplus").divided(before, factor)
    rates = (nn.functional.softplus(sign * tensor, threshold=700) for tensor in (before, after))
    torch.testing.assert_close(next(rates), next(rates) * factor, rtol=1e-7, atol=0)


@pytest.mark.parametrize("build", [recurrent.recurrent_gemma, recurrent.rwkv()], ids=["RG-LRU", "RWKV-4"])
def test_one_dimensional_states_are_measured_but_said_to_be_uninformative(build: Any) -> None:
    model, _, _ = built(build)
    infos = [info for info in describe(model).layers if info.state_capacity == 1]
    assert infos
    assert all(info.supported and "one dimension" in info.uninformative for info in infos)


# lightning attention, RWKV-4


def test_padding_on_the_left_is_in_no_column_of_lightning_attention() -> None:
    model, args, kwargs = built(recurrent.minimax(attention_mask=recurrent.LEFT_PADDED))
    for operator in captured(model.eval(), *args, **kwargs):
        columns = operator.materialize()[0].abs().sum((0, 1))
        assert (columns[:5] == 0).all()
        assert (columns[5:] > 0).all()


def test_a_decay_of_lightning_attention_that_nothing_can_change_has_no_handle() -> None:
    model, _, _ = built(recurrent.minimax())
    assert [info.handles for info in describe(model).layers] == [(), ()]


def test_keys_of_rwkv4_whose_exponential_overflows_give_the_same_operator() -> None:
    """The rows of T are weighted means: adding the same number to all keys changes nothing."""
    model, _, _ = built(recurrent.rwkv())
    attention = model.rwkv.blocks[0].attention
    hidden = torch.randn(1, 24, 16)
    shift = torch.zeros(16)
    attention.key.register_forward_hook(lambda module, args, output: output + shift)
    [plain] = captured(attention, hidden)
    shift += 2000.0
    [shifted] = captured(attention, hidden)
    assert shifted.finite().all()
    torch.testing.assert_close(shifted.materialize(), plain.materialize(), rtol=1e-3, atol=1e-6)


# convolutions


class WithConv(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv1d(4, 4, 3, padding=1, groups=4), r"padding 1: it looks at later tokens; .* 2 tokens back"),
        (nn.Conv1d(4, 4, 3, padding="same", groups=4), "padding same: it looks at later tokens"),
        (nn.Conv1d(4, 4, 3, stride=2), "stride 2: its outputs are fewer"),
        (nn.Conv1d(4, 4, 3, padding=2, padding_mode="circular"), "padding_mode 'circular'"),
        (nn.Conv1d(4, 8, 3, padding=2), "4 channels become 8"),
        (nn.Conv1d(512, 512, 4, padding=3), r"its H_i has 1536 rows"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else None,
)
def test_a_convolution_without_a_causal_operator_of_bounded_cost_is_skipped_with_the_reason(
    conv: nn.Module, reason: str
) -> None:
    [info] = describe(WithConv(conv)).layers
    assert info.name == "conv"
    assert not info.supported
    assert re.search(reason, info.reason)


def test_convolutions_that_mix_no_tokens_or_take_their_input_another_way_are_no_mixers() -> None:
    class Transposed(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    assert describe(WithConv(nn.Conv1d(4, 4, 1))).layers == ()
    assert describe(WithConv(Transposed(4, 4, 3))).layers == ()


def test_only_filters_long_enough_to_be_a_memory_are_informative() -> None:
    def why(taps: int) -> str:
        [info] = describe(WithConv(nn.Conv1d(4, 4, taps, padding=taps - 1, groups=4))).layers
        assert info.supported
        assert info.state_capacity == taps - 1
        return info.uninformative

    assert "short filter" in why(4)
    assert "short filter" in why(64)
    assert why(65) == ""


def test_the_few_tokens_of_a_dense_convolution_say_all_about_longer_sequences() -> None:
    conv = nn.Conv1d(3, 3, 4, padding=3)
    short = capture_operators(WithConv(conv), torch.randn(1, 3, 40))["conv"]
    assert (short.length, short.block_size) == (6, 3)
    # The impulse responses of the layer itself, one input number after the other.
    impulses = torch.eye(60, dtype=torch.float32).reshape(60, 20, 3).mT
    with torch.no_grad():
        T = (conv(impulses)[..., :20] - conv.bias[:, None]).mT.reshape(60, 60).mT
    whole = DenseOperator(T, 3)
    for i in (3, 10, 17):
        values = whole.singular_values([i])[0, 0, 0]
        torch.testing.assert_close(short.singular_values([3])[0, 0, 0], values[:9])
        assert (values[9:] < 1e-6).all()


def test_a_sequence_shorter_than_a_filter_is_read_as_well() -> None:
    model, (x,), _ = convolutions.causal(6, 4)()
    [operator] = captured(model, x[:, :3])
    assert operator.length == 3
    assert operator.singular_values([1]).shape[-1] == 6


class Lfm3VlVisionShortConv(nn.Module):
    """Is called like the layer of the text, and is a convolution over an image."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.spatial_conv = nn.Linear(8, 8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.spatial_conv(self.in_proj(x).mT.unflatten(2, (4, -1))).flatten(2).mT


def test_a_short_convolution_over_an_image_is_listed_for_what_it_is() -> None:
    [info] = describe(nn.Sequential(Lfm3VlVisionShortConv())).layers
    assert info.name == "0"
    assert not info.supported
    assert "not one along the sequence" in info.reason
