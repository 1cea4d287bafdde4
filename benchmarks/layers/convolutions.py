"""Cases of convolutions: torch's Conv1d in causal layers, and the short convolutions of LFM2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.layers.case import Case, Mixed
from benchmarks.layers.mamba import Built, arriving, hf
from benchmarks.layers.recurrent import LEFT_PADDED
from ess_monitor.capture.hooks.call_site import Call


class Causal(nn.Module):
    """A causal convolution over (batch, length, channels): padded on both sides and cropped, or padded in front."""

    def __init__(self, channels: int, taps: int, *, in_front: bool = False, **options: Any) -> None:
        super().__init__()
        back = (taps - 1) * options.get("dilation", 1)
        self.in_front = back if in_front else 0
        self.conv = nn.Conv1d(channels, channels, taps, padding=0 if in_front else back, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x.transpose(1, 2), (self.in_front, 0))
        return self.conv(x)[..., : x.shape[2] - self.in_front].transpose(1, 2)


def causal(*args: int, **options: Any) -> Callable[[], Built]:
    return lambda: (nn.Sequential(nn.Linear(6, 6), Causal(*args, **options)), (torch.randn(2, 24, 6),), {})


def lfm2(name: str, **config: Any) -> Callable[[], Built]:
    def build() -> Built:
        model, tokens, kwargs = hf(
            name,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            layer_types=["conv", "conv"],
            **config,
        )
        return model, tokens, {**kwargs, "attention_mask": LEFT_PADDED}

    return build


def _inputs(call: Call) -> tuple[Tensor, Tensor]:
    """Return u and y, (batch, channels, length), y without its bias."""
    conv, x = call.layer, call.args[0].detach()
    in_front = (conv.kernel_size[0] - 1) * conv.dilation[0] if conv.padding[0] == 0 else 0
    y = call.output.detach() if conv.bias is None else call.output.detach() - conv.bias.detach()[:, None]
    return x[..., in_front:], y[..., : x.shape[2] - in_front]


def per_channel(call: Call) -> Mixed:
    """Return y = T u per channel."""
    u, y = _inputs(call)
    return Mixed(u[..., None], y[..., None])


def per_group(call: Call) -> Mixed:
    """Return the same per group of channels, on as many tokens as T has; each token is a block of T."""
    conv = call.layer
    tokens = 2 * (conv.kernel_size[0] - 1) * conv.dilation[0]
    u, y = (t[..., :tokens].unflatten(1, (conv.groups, -1)).mT.flatten(2)[..., None] for t in _inputs(call))
    return Mixed(u, y)


def short_conv(call: Call) -> Mixed:
    """Return y = T x, where y is the input of the following projection."""
    batch, length, width = call.output.shape
    x = call.output.chunk(3, 2)[2].transpose(1, 2)[..., None]
    return Mixed(x, arriving(call.layer.out_proj, batch, length, width // 3).transpose(1, 2)[..., None])


def case(library: str, layer: str, *args: Any, **options: Any) -> Case:
    return Case(library, layer, *args, pulled=False, scaled=False, **options)


CASES = (
    case("torch", "Conv1d", causal(6, 4, groups=6), per_channel, note="depthwise, cropped"),
    case("torch", "Conv1d", causal(6, 4, groups=6, in_front=True), per_channel, note="depthwise, padded in front"),
    case("torch", "Conv1d", causal(6, 3, groups=6, dilation=3), per_channel, note="depthwise, dilated"),
    case("torch", "Conv1d", causal(6, 4), per_group, note="dense"),
    case("torch", "Conv1d", causal(6, 3, groups=2, dilation=2), per_group, note="groups, dilated"),
    case("transformers", "Lfm2ShortConv", lfm2("Lfm2"), short_conv, note="left padding"),
    case(
        "transformers",
        "Lfm2MoeShortConv",
        lfm2("Lfm2Moe", moe_intermediate_size=16, num_experts=2, num_experts_per_tok=1),
        short_conv,
        note="left padding",
    ),
)
