"""Cases of softmax attention: transformers' interface and torch's own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.layers.case import Case, Mixed
from benchmarks.layers.mamba import TOKENS
from ess_monitor.capture.hooks.call_site import Call

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
PADDING = torch.ones(2, 24, dtype=torch.long)
PADDING[0, :5] = 0


def hf(name: str, kernel: str, **config: Any) -> Callable[[], Built]:
    """Return a function that builds a small causal language model of transformers, and left-padded tokens."""

    def build() -> Built:
        import transformers

        settings = {
            "vocab_size": 32,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "initializer_range": 0.4,  # logits of order one: with the usual 0.02 every row is nearly uniform
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **config,
        }
        model_config = getattr(transformers, f"{name}Config")(**settings)
        model = transformers.AutoModelForCausalLM.from_config(model_config, attn_implementation=kernel)
        return model, TOKENS, {"use_cache": False, "attention_mask": PADDING}

    return build


def interface(call: Call) -> Mixed:
    """Return y = T u with u the values. T is zero in rows of padding, so y is set to zero there."""
    _, q, _, v, mask = list(call.kwargs.values())[:5]
    return _mixed(q, v, mask, call.output[0].transpose(1, 2))


def function(call: Call) -> Mixed:
    """Return the same for `scaled_dot_product_attention`."""
    return _mixed(call.kwargs["query"], call.kwargs["value"], call.kwargs["attn_mask"], call.output)


def _mixed(q: Tensor, v: Tensor, mask: Tensor | None, y: Tensor) -> Mixed:
    if mask is not None:
        keep = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        y = y * keep.any(-1, keepdim=True)
    return Mixed(v.repeat_interleave(q.shape[1] // v.shape[1], 1), y)


def module(call: Call) -> Mixed:
    """Return y = out_proj(concatenated heads)."""
    mha = call.module
    assert isinstance(mha, nn.MultiheadAttention)
    x = call.args[0] if mha.batch_first else call.args[0].transpose(0, 1)
    v = F.linear(x, mha.in_proj_weight.chunk(3)[2], mha.in_proj_bias.chunk(3)[2])
    y = call.output[0] if mha.batch_first else call.output[0].transpose(0, 1)
    weight, bias = mha.out_proj.weight.detach().double(), mha.out_proj.bias.detach().double()
    return Mixed(
        v.unflatten(-1, (mha.num_heads, -1)).transpose(1, 2),
        y,
        lambda product: F.linear(product.transpose(1, 2).flatten(2), weight, bias),
    )


class CausalSelfAttention(nn.Module):
    """A layer as users write it."""

    def __init__(self, width: int, num_heads: int, num_key_heads: int, *, masked: bool) -> None:
        super().__init__()
        self.num_heads, self.num_key_heads, self.masked = num_heads, num_key_heads, masked
        size = width // num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * num_key_heads * size)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2 * self.num_key_heads, -1)).transpose(1, 2).chunk(2, 1)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() if self.masked else None
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=not self.masked,
            scale=0.5,
            enable_gqa=self.num_key_heads < self.num_heads,
        )
        return y.transpose(1, 2).flatten(2)


def own(masked: bool) -> Built:
    """Build a layer that calls the function itself."""
    return CausalSelfAttention(32, 4, 2, masked=masked), (3 * torch.randn(2, 24, 32),), {}


class MaskedEncoder(nn.Module):
    """`nn.TransformerEncoder` with a causal mask, as a decoder-only model."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1 if self.encoder.layers[0].self_attn.batch_first else 0]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        encoded: Tensor = self.encoder(x, mask=mask, is_causal=True)
        return encoded


def encoder(batch_first: bool) -> Built:
    """Build attention inside torch's own layers."""
    shape = (2, 24, 32) if batch_first else (24, 2, 32)
    return MaskedEncoder(batch_first=batch_first), (3 * torch.randn(shape),), {}


def _case(layer: str, kernel: str, note: str = "", **config: Any) -> Case:
    name = layer.removesuffix("Attention")
    note = f"{kernel}, {note}" if note else kernel
    build = hf(name, kernel, **config)
    return Case("transformers", layer, build, interface, note=note, pulled=False, scaled=False)


_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
_DENSE = ("eager", "sdpa")

CASES = (
    *(_case("LlamaAttention", kernel, "grouped keys") for kernel in _DENSE),
    *(_case("Qwen3Attention", kernel) for kernel in _DENSE),
    *(_case("MistralAttention", kernel, "sliding window", sliding_window=6) for kernel in _DENSE),
    *(_case("GPT2Attention", kernel, attn_pdrop=0.0) for kernel in _DENSE),
    _case("Gemma2Attention", "eager", "soft cap", attn_logit_softcapping=2.0, sliding_window=6),
    _case("GptOssAttention", "eager", "sinks", sliding_window=6, **_EXPERTS),
    *(
        _case(
            *("JambaAttention", kernel, "hybrid"),
            attn_layer_offset=1,
            attn_layer_period=2,
            num_experts=1,
            use_mamba_kernels=False,  # older versions raise without them
        )
        for kernel in _DENSE
    ),
    Case(
        "transformers",
        "FalconAttention",
        hf("Falcon", "sdpa", attention_dropout=0.0),
        function,
        note="sdpa by itself",
        pulled=False,
        scaled=False,
    ),
    *(
        Case(
            "torch",
            "CausalSelfAttention",
            lambda masked=masked: own(masked),
            function,
            note=note,
            pulled=False,
            scaled=False,
        )
        for masked, note in ((False, "is_causal"), (True, "mask"))
    ),
    *(
        Case(
            "torch",
            "MultiheadAttention",
            lambda first=first: encoder(first),
            module,
            note=note,
            pulled=False,
            scaled=False,
        )
        for first, note in ((True, "batch first"), (False, "length first"))
    ),
)
