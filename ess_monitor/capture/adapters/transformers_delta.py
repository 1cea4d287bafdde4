"""The gated delta rule in transformers: Qwen3-Next, Qwen3.5, OLMo-Hybrid (one decay per head), Kimi Linear (one per
state dimension), and whatever calls the same ops.

The ops are those of flash-linear-attention with other names for the same arguments, and are handed decays and betas
with their activations done. Padding has keys of 0 here, since the layers set its input to 0 in front of a convolution
without bias: it is in no T.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from ess_monitor.capture.adapters.fla_delta import delta_rule
from ess_monitor.capture.adapters.gated_linear import goes_on, precise
from ess_monitor.capture.adapters.layer_attributes import attribute
from ess_monitor.capture.handles import AlphaHandle, DecayHandle, DecayInputs, Transition, under_names
from ess_monitor.capture.hooks.call_site import Call, CallSite
from ess_monitor.capture.layer_adapter import FAMILIES, LayerAdapter
from ess_monitor.capture.spec import LazyOperator

_NORM_EPSILON = 1e-6
"""Of the norm that the ops take of queries and keys."""


def gated_delta_rule(call: Call) -> LazyOperator | None:
    """`*_gated_delta_rule(query, key, value, g, beta, ...)`, `*_kimi_delta_attention` with `g` per state dimension."""
    q, k, v = (call.kwargs[name] for name in ("query", "key", "value"))
    return delta_rule(dataclasses.replace(call, kwargs={**call.kwargs, "q": q, "k": k, "v": v}))


def _decay(layer: nn.Module, site: CallSite) -> DecayHandle:
    """A_t = (I - beta_t k_t k_t^T) diag(exp g_t): the identity only where nothing decays and nothing is replaced."""

    def read(call: Call) -> DecayInputs | None:
        if goes_on(call, call.kwargs["value"]):
            return None
        heads, normalized = call.kwargs["value"].shape[2], bool(call.kwargs["use_qk_l2norm_in_kernel"])

        def transition(tensors: tuple[Tensor, ...]) -> Transition:
            g, beta, k = (precise(tensor).transpose(1, 2) for tensor in tensors)
            if normalized:
                k = k * (k.square().sum(-1, keepdim=True) + _NORM_EPSILON).rsqrt()
            k = k.repeat_interleave(heads // k.shape[1], 1)
            log_decay = g if g.dim() == 4 else g[..., None]
            return Transition(log_decay, -beta[..., None] * k, log_decay.exp() * k, state_size=k.shape[-1])

        return DecayInputs(tuple(call.kwargs[name] for name in ("g", "beta", "key")), transition, (1, 1, 1))

    return DecayHandle(_parameters(layer), site, read, under_names("g", "beta", "key"))


def _parameters(layer: nn.Module) -> tuple[str, ...]:
    """What gates, betas and keys are made from, by the names that these layers give it."""
    names = (
        *("forget_gate", "in_proj_a", "in_proj_ba", "a_proj", "A_log", "dt_bias"),  # decay
        *("in_proj_b", "b_proj"),  # beta
        *("in_proj_qkv", "in_proj_qkvz", "k_proj", "conv1d"),  # keys
    )
    return tuple(name for name in names if hasattr(layer, name))


def _alpha(layer: nn.Module) -> AlphaHandle | None:
    """log A = -exp(A_log) softplus(.); with a lower bound A_log stands inside a sigmoid and scales nothing."""
    gate = getattr(layer, "forget_gate", layer)
    bounded = any(value not in (None, False) for name, value in vars(gate).items() if "safe" in name or "bound" in name)
    if bounded or not isinstance(getattr(gate, "A_log", None), Tensor):
        return None
    return AlphaHandle("A_log" if gate is layer else "forget_gate.A_log", 1.0)


FAMILIES.append(
    LayerAdapter(
        operator="DeltaRecurrence",
        ops={
            "torch_chunk_gated_delta_rule": gated_delta_rule,
            "torch_recurrent_gated_delta_rule": gated_delta_rule,
            "chunk_kimi_delta_attention": gated_delta_rule,
            "recurrent_kimi_delta_attention": gated_delta_rule,
        },
        state_capacity=lambda layer: attribute(layer, "head_k_dim", "head_dim"),
        channels=lambda layer: attribute(layer, "num_v_heads", "num_heads"),
        decay=_decay,
        alpha=_alpha,
    )
)
