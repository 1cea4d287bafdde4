"""Cases of Mamba's selective scan: transformers, and mamba_ssm with its reference ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.layers.case import Case, Mixed
from ess_monitor.capture.hooks.call_site import Call

TOKENS = (torch.arange(2 * 24).reshape(2, 24) * 7 % 32,)
Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class StubbedCase(Case):
    """A case of mamba_ssm, which needs `benchmarks.layers.mamba_ssm_stub` and no compiled extension."""

    @property
    def package(self) -> str:
        return "benchmarks.layers.mamba_ssm_stub"


def hf(name: str, **config: Any) -> Built:
    """Build a small causal language model of transformers."""
    import transformers

    # With the usual 0.02 the skip connection is so much larger than T u that a wrong T would pass.
    settings = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.3, **config}
    model_config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name}ForCausalLM")(model_config), TOKENS, {"use_cache": False}


def jamba() -> Built:
    """Build two layers of Mamba without attention and experts."""
    return hf(
        "Jamba",
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_layer_period=8,
        attn_layer_offset=7,
        expert_layer_period=8,
        expert_layer_offset=7,
        num_experts=1,
        num_experts_per_tok=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,  # older versions raise without them
    )


def zamba(heads: int) -> Built:
    """Build two layers, each with `heads` scans."""
    return hf(
        "Zamba",
        intermediate_size=32,
        num_attention_heads=2,
        layers_block_type=["mamba", "mamba"],
        mamba_d_state=8,
        mamba_dt_rank=4,
        n_mamba_heads=heads,
        use_mamba_kernels=False,
    )


def mamba_ssm(fast: bool) -> Built:
    """Build two layers of mamba_ssm, with or without the fused op."""
    from benchmarks.layers import mamba_ssm_stub

    layer, _ = mamba_ssm_stub.layers()
    model = nn.Sequential(*(layer(16, d_state=8, use_fast_path=fast) for _ in range(2)))
    return model, (torch.randn(2, 24, 16),), {}


def arriving(module: nn.Module, *shape: int) -> Tensor:
    """Return a tensor into which the module's next call copies its first input.

    Use it for values that a layer computes between two of its sub-modules.
    """
    seen = torch.full(shape, torch.nan)

    def copy(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.copy_(args[0].detach())
        handle.remove()

    handle = module.register_forward_pre_hook(copy)
    return seen


def scan(call: Call) -> Mixed:
    """Return y = (T u + D u) silu(z)."""
    if not call.op:
        return _own_code(call)
    u, z, D = (call.kwargs[name].detach().double() for name in (next(iter(call.kwargs)), "z", "D"))
    y = call.output[0] if isinstance(call.output, tuple) else call.output
    return Mixed(u[..., None], y, lambda product: (product[..., 0] + D[:, None] * u) * nn.functional.silu(z))


def _own_code(call: Call) -> Mixed:
    """Return the same of a layer without an op: u goes into `x_proj`, then z into the activation, y into `out_proj`."""
    u, D = call.args[0].detach().double().mT, call.layer.D.detach().double()[:, None]
    z, y = arriving(call.layer.act, *u.shape), arriving(call.layer.out_proj, *u.mT.shape)
    gated = lambda product: (product[..., 0] + D * u) * nn.functional.silu(z.double())  # noqa: E731
    return Mixed(u[..., None], y.mT, gated)


def fused(call: Call) -> Mixed:
    """Return y = W ((T u + D u) silu(z)), where u is the convolved half of xz."""
    given = {k: v.detach().double() for k, v in call.kwargs.items() if isinstance(v, Tensor)}
    x, z = given["xz"].chunk(2, 1)
    weight = given["conv1d_weight"]
    u = nn.functional.conv1d(x, weight, given["conv1d_bias"], padding=weight.shape[2] - 1, groups=len(weight))
    u = nn.functional.silu(u[..., : x.shape[2]])

    def finish(product: Tensor) -> Tensor:
        gated = (product[..., 0] + given["D"][:, None] * u) * nn.functional.silu(z)
        return gated.mT @ given["out_proj_weight"].mT

    return Mixed(u[..., None], call.output, finish)


def zamba_input(call: Call) -> Mixed:
    """Return u and y of the scans, one per head, by running the layer's own code on its input."""
    layer, inputs, scans = call.layer, call.args[0], []
    import transformers.models.zamba.modeling_zamba as modeling

    if not hasattr(modeling, "mamba_selective_scan"):
        return _zamba_own_code(call)
    original = modeling.mamba_selective_scan

    def keep(u: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = original(u, *args, **{**kwargs, "z": None, "D": None})
        scans.append((u.detach(), output.detach()))
        return output

    forward_hooks, layer.in_proj._forward_hooks = layer.in_proj._forward_hooks, type(layer._forward_hooks)()
    modeling.mamba_selective_scan = keep
    try:
        with torch.no_grad():
            type(layer).forward(layer, inputs)
    finally:
        modeling.mamba_selective_scan = original
        layer.in_proj._forward_hooks = forward_hooks
    u, y = (torch.cat(tensors, 1)[..., None] for tensors in zip(*scans, strict=True))
    return Mixed(u, y)


def _zamba_own_code(call: Call) -> Mixed:
    """Return u and y of a layer without an op, whose gate is among what `in_proj` returns."""
    x, z = (call.output.detach().double()[..., k::2].mT for k in (0, 1))
    given = {name: tensor.detach().double() for name, tensor in call.layer.named_parameters()}
    weight = given["conv1d.weight"]
    u = nn.functional.conv1d(x, weight, given["conv1d.bias"], padding=weight.shape[2] - 1, groups=len(weight))
    u, D = nn.functional.silu(u[..., : x.shape[2]]), given["D"].flatten()[:, None]
    y = arriving(call.layer.out_proj, *x.mT.shape)
    return Mixed(u[..., None], y.mT, lambda product: (product[..., 0] + D * u) * nn.functional.silu(z))


CASES = (
    Case("transformers", "MambaMixer", lambda: hf("Mamba", state_size=8), scan),
    Case("transformers", "FalconMambaMixer", lambda: hf("FalconMamba", state_size=8), scan),
    Case("transformers", "JambaMambaMixer", jamba, scan),
    Case("transformers", "ZambaMambaMixer", lambda: zamba(1), zamba_input),
    Case("transformers", "ZambaMambaMixer", lambda: zamba(2), zamba_input, note="two scans"),
    StubbedCase("mamba_ssm", "Mamba", lambda: mamba_ssm(True), fused, note="fused"),
    StubbedCase("mamba_ssm", "Mamba", lambda: mamba_ssm(False), scan, note="unfused"),
)
