"""Cases of the gated delta rule in transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.layers.case import Case, Mixed
from benchmarks.layers.mamba import TOKENS, Built
from benchmarks.layers.recurrent import LEFT_PADDED
from ess_monitor.capture.hooks.call_site import Call

OPS = (
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
    "chunk_kimi_delta_attention",
    "recurrent_kimi_delta_attention",
)
GATED_DELTA = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 4,
}
EXPERTS = {
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 2,
    "num_experts_per_tok": 2,
}
KIMI = {
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "linear_head_dim": 8,
    "linear_num_heads": 2,
    "mlp_layer_types": ["dense", "dense"],
}


def hf(name: str, config: str = "", *, attention: bool = False, **settings: Any) -> Callable[[], Built]:
    """Return a function that builds a small causal language model of two delta layers, and left-padded tokens.

    `attention` adds a layer of attention, for models that require one.
    """

    def build() -> Built:
        import transformers

        kinds = ["linear_attention", "linear_attention"] + ["full_attention"] * attention
        common = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": len(kinds), "initializer_range": 0.3}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        model_config = getattr(transformers, config or f"{name}Config")(
            **common, **special, layer_types=kinds, **settings
        )
        model = getattr(transformers, f"{name}ForCausalLM")(model_config)
        _slow_down(model)
        if not torch.cuda.is_available():
            _without_kernels(model)
        return model, TOKENS, {"use_cache": False, "attention_mask": LEFT_PADDED}

    return build


def _slow_down(model: nn.Module) -> None:
    """Set decays like those of a trained layer. Many initializations keep almost nothing after one token."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.copy_(torch.linspace(-3, 0, parameter.numel()).view_as(parameter))


def _without_kernels(model: nn.Module) -> None:
    """Make the model call transformers' torch ops. It prefers fla's kernels if fla is installed, but those need an
    accelerator."""
    namespace = vars(sys.modules[type(model).__module__])
    for op in OPS:
        if op in namespace:
            namespace[op] = getattr(namespace[op], "__wrapped__", namespace[op])


def delta_rule(call: Call) -> Mixed:
    """Return y = T v for every value head."""
    value = call.kwargs["value"] if "value" in call.kwargs else call.kwargs["v"]
    return Mixed(value.transpose(1, 2), call.output[0].transpose(1, 2))


def case(layer: str, build: Callable[[], Built], **options: Any) -> Case:
    return Case("transformers", layer, build, delta_rule, note="left padding", **options)


CASES = (
    case("Qwen3NextGatedDeltaNet", hf("Qwen3Next", **GATED_DELTA, **EXPERTS)),
    case("Qwen3_5GatedDeltaNet", hf("Qwen3_5", "Qwen3_5TextConfig", **GATED_DELTA)),
    case("OlmoHybridGatedDeltaNet", hf("OlmoHybrid", attention=True, **GATED_DELTA)),
    case("KimiLinearDeltaAttention", hf("KimiLinear", **KIMI)),
)
