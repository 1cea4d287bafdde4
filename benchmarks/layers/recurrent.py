"""Cases of recurrences with special decays in transformers: RG-LRU, lightning attention, RWKV-4."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.layers.case import Case, Mixed
from benchmarks.layers.mamba import TOKENS, Built, arriving, hf
from ess_monitor.capture.hooks.call_site import Call

LEFT_PADDED = torch.ones_like(TOKENS[0])
LEFT_PADDED[0, :5] = 0


def recurrent_gemma() -> Built:
    model, _, kwargs = hf(
        "RecurrentGemma",
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        lru_width=16,
        block_types=("recurrent",),
        w_init_variance_scale=1.0,
    )
    # Two documents in the second row: each starts at position 0.
    positions = torch.stack((torch.arange(24), torch.arange(24) % 14))
    return model, (), {**kwargs, "input_ids": TOKENS[0], "position_ids": positions}


def rg_lru(call: Call) -> Mixed:
    """Return y = T x per channel."""
    return Mixed(_channels(call.args[0]), call.output.transpose(1, 2)[..., None])


def minimax(**kwargs: Tensor) -> Callable[[], Built]:
    def build() -> Built:
        model, tokens, settings = hf(
            "MiniMax",
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=32,
            num_local_experts=2,
            block_size=16,
            layer_types=["linear_attention", "linear_attention"],
        )
        return model, tokens, {**settings, **kwargs}

    return build


def lightning(call: Call) -> Mixed:
    """Return y = T v, where y is the input of the following norm."""
    batch, length, heads = *call.output.shape[:2], call.layer.num_attention_heads
    v = call.output.unflatten(2, (heads, 3, -1))[:, :, :, 2].transpose(1, 2)
    mask = call.layer_kwargs.get("attention_mask")
    if not call.op and mask is not None:  # older versions hide padding after the call that is read
        v = v * mask[:, None, :, None]
    y = arriving(call.layer.norm, batch, length, heads * v.shape[-1])
    return Mixed(v, y.unflatten(2, (heads, -1)).transpose(1, 2))


def rwkv(**kwargs: bool) -> Callable[[], Built]:
    def build() -> Built:
        model, tokens, _ = hf("Rwkv", attention_hidden_size=16, intermediate_size=32)
        with torch.no_grad():
            for (
                block
            ) in model.rwkv.blocks:  # as after training: keys of order one, and different rates and bonuses per channel
                block.attention.key.weight.normal_()
                block.attention.time_decay.copy_(torch.linspace(-4, 1.5, 16))
                block.attention.time_first.copy_(torch.linspace(-2, 1, 16))
        return model, tokens, kwargs

    return build


def wkv(call: Call) -> Mixed:
    """Return y = T v plus the bonus on the diagonal of T."""
    names = ("time_decay", "time_first", "key", "value")
    decay, bonus, k, v = (call.kwargs[name].detach().double() for name in names)
    lags = torch.arange(k.shape[1])[:, None] - torch.arange(k.shape[1])
    lags = lags[..., None]
    weights = torch.exp(-(lags - 1).clamp(min=0) * decay.exp() + k[:, None]) * (lags > 0)
    diagonal = torch.exp(bonus + k)
    own = _channels(diagonal / (weights.sum(2) + diagonal) * v)
    y = call.output[0].transpose(1, 2)[..., None]
    return Mixed(_channels(v), y, lambda product: product + own)


def _channels(tensor: Tensor) -> Tensor:
    return tensor.detach().transpose(1, 2)[..., None]


CASES = (
    Case("transformers", "RecurrentGemmaRglru", recurrent_gemma, rg_lru, note="packed documents"),
    Case("transformers", "MiniMaxLightningAttention", minimax(), lightning, pulled=False, scaled=False),
    Case(
        "transformers",
        "MiniMaxLightningAttention",
        minimax(attention_mask=LEFT_PADDED),
        lightning,
        note="left padding",
        pulled=False,
        scaled=False,
    ),
    Case("transformers", "RwkvSelfAttention", rwkv(use_cache=False), wkv),
    Case("transformers", "RwkvSelfAttention", rwkv(use_cache=True), wkv, note="with a cache", modes=("eval",)),
)
