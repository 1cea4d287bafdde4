"""Cases of flash-linear-attention, whose Triton kernels run in Triton's interpreter on the CPU.

Layers use one kernel for short sequences without gradients (fused recurrent), and another one for long sequences and in
training (chunk). The cases run both.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.layers.case import Case, Mixed
from benchmarks.layers.triton_interpreter import interpret_triton
from ess_monitor.capture.hooks.call_site import Call

LIBRARY = "flash-linear-attention"
RECURRENT, CHUNK = 8, 66
"""Tokens. At most 64 go to the recurrent kernels; 66 are one chunk and a part of a second one."""


def layer(
    path: str, length: int, *, width: int = 16, batch: int = 2, **settings: Any
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Build the layer `module.Class` of `fla.layers` with a norm before it, and random sequences.

    The norm is needed: RWKV-7 writes its gradients into the memory of its input, and would overwrite the sequences.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fla warns that there is no accelerator
        module, name = path.split(".")
        interpret_triton("fla")
        cls = getattr(importlib.import_module(f"fla.layers.{module}"), name)
        return (
            nn.Sequential(nn.LayerNorm(width), cls(hidden_size=width, **settings)),
            (torch.randn(batch, length, width),),
            {},
        )


def op(call: Call) -> Mixed:
    """Return y = T v."""
    return Mixed(call.kwargs["v"].transpose(1, 2), call.output[0].transpose(1, 2))


def rwkv6(call: Call) -> Mixed:
    """Return y = T v + (r . (bonus * k)) v. The second term is the token's direct contribution to its own output."""
    r, k, v, bonus = (call.kwargs[name].detach().double() for name in ("r", "k", "v", "u"))
    own = ((r * bonus * k).sum(-1, keepdim=True) * v * call.kwargs["scale"]).transpose(1, 2)
    mixed = op(call)
    return Mixed(mixed.u, mixed.y, lambda product: product + own)


def both(
    path: str,
    *,
    note: str = "",
    mixed: Callable[[Call], Mixed] = op,
    pulled: bool = True,
    scaled: bool = False,
    chunk_tolerance: float = 1e-5,
    chunk_note: str = "",
    chunk_length: int = CHUNK,
    **settings: Any,
) -> tuple[Case, Case]:
    """Return the cases of a layer on both kernels."""
    name = path.split(".")[1]

    def noted(*notes: str) -> str:
        return ", ".join(text for text in notes if text)

    return (
        Case(
            LIBRARY,
            name,
            lambda: layer(path, RECURRENT, **settings),
            mixed,
            note=noted(note, "fused recurrent"),
            modes=("eval",),
            pulled=False,
            scaled=scaled,
        ),
        Case(
            LIBRARY,
            name,
            lambda: layer(path, chunk_length, batch=1, **settings),
            mixed,
            tolerance=chunk_tolerance,
            note=noted(note, "chunk", chunk_note),
            modes=("train",),
            pulled=pulled,
            scaled=False,
        ),
    )


CASES = (
    *both("gla.GatedLinearAttention", scaled=True, num_heads=2, expand_k=1.0),
    *both("gla.GatedLinearAttention", note="grouped k", pulled=False, num_heads=2, num_kv_heads=1, expand_k=1.0),
    *both("hgrn2.HGRN2Attention", expand_ratio=8),
    *both("hgrn2.HGRN2Attention", note="short convolution", pulled=False, expand_ratio=8, use_short_conv=True),
    *both("simple_gla.SimpleGatedLinearAttention", scaled=True, num_heads=2),
    *both("multiscale_retention.MultiScaleRetention", pulled=False, width=32, num_heads=2),
    *both("linear_attn.LinearAttention", pulled=False, num_heads=2),
    *both(
        "linear_attn.LinearAttention",
        note="normalized",
        pulled=False,
        num_heads=2,
        feature_map="elu",
        do_feature_map_norm=True,
    ),
    *both(
        "rwkv6.RWKV6Attention",
        mixed=rwkv6,
        scaled=True,
        num_heads=2,
        expand_k=1.0,
        proj_low_rank_dim=4,
        gate_low_rank_dim=4,
    ),
    Case(
        LIBRARY,
        "DeltaNet",
        lambda: layer("delta_net.DeltaNet", RECURRENT, num_heads=2),
        op,
        note="fused recurrent",
        scaled=False,
    ),
    Case(
        LIBRARY,
        "DeltaNet",
        lambda: layer("delta_net.DeltaNet", RECURRENT, num_heads=2, allow_neg_eigval=True, qk_norm="sum"),
        op,
        note="negative eigenvalues, keys of sum 1, fused recurrent",
        modes=("eval",),
        pulled=False,
        scaled=False,
    ),
    *both("gated_deltanet.GatedDeltaNet", scaled=True, num_heads=2, head_dim=8),
    *both(
        "gated_deltanet.GatedDeltaNet", note="grouped v", chunk_length=RECURRENT, num_heads=1, num_v_heads=2, head_dim=8
    ),
    *both(
        "gated_deltanet.GatedDeltaNet",
        note="negative eigenvalues",
        chunk_length=RECURRENT,
        num_heads=2,
        head_dim=8,
        allow_neg_eigval=True,
    ),
    *both("kda.KimiDeltaAttention", pulled=False, scaled=True, num_heads=1, head_dim=8),
    *both(
        "kda.KimiDeltaAttention",
        note="grouped v, negative eigenvalues",
        pulled=False,  # eight seconds; with a lower bound it is shorter
        chunk_length=RECURRENT,
        num_heads=1,
        num_v_heads=2,
        head_dim=8,
        allow_neg_eigval=True,
    ),
    *both(
        "kda.KimiDeltaAttention",
        note="lower bound",
        chunk_length=RECURRENT,
        num_heads=2,
        head_dim=8,
        lower_bound=-5.0,
    ),
    *both(
        "rwkv7.RWKV7Attention",
        # The chunk kernel differs by 1.1e-4 from the library's own recurrent kernel on the same arguments, T by 5e-7.
        chunk_tolerance=2e-4,
        chunk_note="the kernel rounds to 1e-4",
        head_dim=8,
        layer_idx=0,
        num_hidden_layers=2,
        decay_low_rank_dim=4,
        gate_low_rank_dim=4,
        a_low_rank_dim=4,
        v_low_rank_dim=4,
    ),
)
