"""Cases of Mamba-2's scalar recurrence: transformers, fla, and mamba_ssm with its reference ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.layers.case import Case, Mixed
from benchmarks.layers.mamba import Built, StubbedCase, arriving, hf
from ess_monitor.capture.hooks.call_site import Call

SIZES = {"mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_expand": 2}
ATTENTION = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}


def zamba2(chunk_size: int) -> Built:
    """Build two layers, on 24 tokens."""
    return hf(
        "Zamba2",
        num_hidden_layers=2,
        layers_block_type=["mamba", "mamba"],
        mamba_d_state=8,
        mamba_headdim=8,
        n_mamba_heads=4,
        mamba_ngroups=2,
        mamba_expand=2,
        **ATTENTION,
        chunk_size=chunk_size,
    )


def nemotron_h() -> Built:
    """Build two layers of Mamba-2 and one of attention."""
    return hf(
        "NemotronH",
        layers_block_type=["mamba", "attention", "mamba"],
        num_hidden_layers=3,
        **ATTENTION,
        head_dim=8,
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=8,
        n_groups=2,
    )


def fla() -> Built:
    """Build two layers whose code calls no op."""
    from benchmarks.layers.triton_interpreter import interpret_triton

    interpret_triton("fla")
    from fla.layers import Mamba2

    sizes = {"head_dim": 8, "hidden_size": 16, "state_size": 8, "n_groups": 2, "chunk_size": 8}
    return _First(Mamba2(**sizes, layer_idx=k) for k in range(2)), (torch.randn(2, 24, 16),), {}


class _First(nn.Module):
    """A sequence of layers that return more than their output."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


def mamba_ssm(fast: bool, **settings: Any) -> Built:
    """Build two layers of mamba_ssm, with or without the fused op."""
    from benchmarks.layers import mamba_ssm_stub

    _, layer = mamba_ssm_stub.layers()
    sizes = {"d_state": 8, "headdim": 8, "ngroups": 2, "chunk_size": 8, **settings}
    model = nn.Sequential(*(layer(16, **sizes, use_mem_eff_path=fast) for _ in range(2)))
    return model, (torch.randn(2, 24, 16),), {}


def scan(call: Call) -> Mixed:
    """Return y = T u + D u, gated if the call has a gate; u (batch, length, heads, channels)."""
    if not call.op:
        return _own_code(call)
    u = call.kwargs[next(iter(call.kwargs))].detach().double().transpose(1, 2)
    D, z = call.kwargs["D"].detach().double(), call.kwargs.get("z")
    y = call.output[0] if isinstance(call.output, tuple) else call.output

    def finish(product: Tensor) -> Tensor:
        y = product + D.reshape(len(D), 1, -1) * u
        return y if z is None else y * nn.functional.silu(z.detach().double().transpose(1, 2))

    return Mixed(u, y.transpose(1, 2), finish)


def _own_code(call: Call) -> Mixed:
    """Return the same of a layer without an op: y goes into its norm, or, with a gate, into `out_proj`."""
    layer, projected = call.layer, call.output.detach().double() * getattr(call.layer, "mup_vector", 1.0)
    inner, heads, D = layer.intermediate_size, layer.num_heads, layer.D.detach().double()[:, None, None]
    z, convolved, _ = projected[..., -inner - layer.conv_dim - heads :].split((inner, layer.conv_dim, heads), 2)
    weight, bias = layer.conv1d.weight.detach().double()[:, 0], layer.conv1d.bias.detach().double()
    u = _convolved(convolved, weight, bias)[..., :inner].unflatten(2, (heads, -1)).transpose(1, 2)
    has_norm = hasattr(layer, "norm")
    y = arriving(layer.norm if has_norm else layer.out_proj, *z.shape).unflatten(2, (heads, -1)).transpose(1, 2)
    gate = 1.0 if has_norm else nn.functional.silu(z).unflatten(2, (heads, -1)).transpose(1, 2)
    return Mixed(u, y, lambda product: (product + D * u) * gate)


def fused(call: Call) -> Mixed:
    """Return y = W norm((T u + D u) silu(z)), where u is the convolved x of [z | x, B, C | dt]."""
    k = {name: v.detach().double() if isinstance(v, Tensor) else v for name, v in call.kwargs.items()}
    heads, width = len(k["A"]), k["headdim"]
    z, convolved, _ = k["zxbcdt"].split((heads * width, len(k["conv1d_weight"]), heads), 2)
    u = _convolved(convolved, k["conv1d_weight"], k["conv1d_bias"])[..., : heads * width]
    u = u.unflatten(2, (heads, width)).transpose(1, 2)

    def finish(product: Tensor) -> Tensor:
        y = (product + k["D"].reshape(heads, 1, -1) * u).transpose(1, 2).flatten(2)
        before = k["rmsnorm_weight"] is not None and k["norm_before_gate"]
        y = y if before else y * nn.functional.silu(z)
        if k["rmsnorm_weight"] is not None:
            y = nn.functional.rms_norm(y, y.shape[-1:], k["rmsnorm_weight"], k["rmsnorm_eps"])
        y = y * nn.functional.silu(z) if before else y
        return y @ k["outproj_weight"].mT

    return Mixed(u, call.output, finish)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = nn.functional.conv1d(x.mT, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))
    return nn.functional.silu(y[..., : x.shape[1]]).mT


def fla_layer(call: Call) -> Mixed:
    """Return u from the output of `in_proj`, and y as the layer's norm gets it, which is called with (y, gate)."""
    layer, seen = call.layer, []
    hook = layer.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    hooks, layer.in_proj._forward_hooks = layer.in_proj._forward_hooks, type(layer._forward_hooks)()
    try:
        with torch.no_grad():
            layer.torch_forward(call.args[0])
    finally:
        hook.remove()
        layer.in_proj._forward_hooks = hooks
    inner = layer.intermediate_size
    convolved = call.output.detach().double()[..., inner : inner + layer.conv_dim]
    u = _convolved(convolved, layer.conv1d.weight.detach().double()[:, 0], layer.conv1d.bias.detach().double())
    u, y = (tensor.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for tensor in (u[..., :inner], seen[0]))
    return Mixed(u, y, lambda product: product + layer.D.detach().double()[:, None, None] * u)


CASES = (
    Case(
        "transformers",
        "Mamba2Mixer",
        lambda: hf("Mamba2", state_size=8, num_heads=4, head_dim=8, n_groups=2, chunk_size=8),
        scan,
    ),
    Case(
        "transformers",
        "BambaMixer",
        lambda: hf("Bamba", **SIZES, **ATTENTION, attn_layer_indices=[], mamba_chunk_size=8),
        scan,
    ),
    Case(
        "transformers",
        "GraniteMoeHybridMambaLayer",
        lambda: hf("GraniteMoeHybrid", **SIZES, **ATTENTION, layer_types=["mamba"] * 2, mamba_chunk_size=8),
        scan,
    ),
    Case("transformers", "Zamba2MambaMixer", lambda: zamba2(8), scan),
    Case("transformers", "Zamba2MambaMixer", lambda: zamba2(32), scan, note="one chunk"),
    Case(
        "transformers",
        "FalconH1Mixer",
        lambda: hf("FalconH1", **SIZES, **ATTENTION, mamba_d_ssm=32, mamba_chunk_size=8),
        scan,
    ),
    Case("transformers", "NemotronHMamba2Mixer", nemotron_h, scan),
    Case("flash-linear-attention", "Mamba2", fla, fla_layer),
    StubbedCase("mamba_ssm", "Mamba2", lambda: mamba_ssm(True), fused, note="fused"),
    StubbedCase("mamba_ssm", "Mamba2", lambda: mamba_ssm(False, dt_limit=(0.01, 0.05)), scan, note="unfused"),
)
