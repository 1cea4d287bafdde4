"""The gated delta rule in transformers.

Qwen3-Next, Qwen3.5, OLMo-Hybrid (one decay per head), Kimi Linear (one per state dimension), and every other layer that
calls the same ops. These are the ops of flash-linear-attention with other names for the same arguments. They are given
decays and betas with the activations applied. Padding has keys of 0, because the layers set its input to 0 in front of
a convolution without bias: it is in no T.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from ess_monitor.capture.adapters.fla_delta import delta_decay, delta_rule
from ess_monitor.capture.adapters.layer_attributes import attribute, existing
from ess_monitor.capture.handles import AlphaHandle, DecayHandle, write_arguments
from ess_monitor.capture.hooks.call_site import Call, CallSite
from ess_monitor.capture.layer_adapter import LayerAdapter
from ess_monitor.capture.spec import LazyOperator

_PARAMETERS = (
    *("forget_gate", "in_proj_a", "in_proj_ba", "a_proj", "A_log", "dt_bias"),  # decay
    *("in_proj_b", "b_proj"),  # beta
    *("in_proj_qkv", "in_proj_qkvz", "k_proj", "conv1d"),  # keys
)
"""What gates, betas and keys are computed from, by the names in these layers."""


def _renamed(call: Call) -> Call:
    q, k, v = (call.kwargs[name] for name in ("query", "key", "value"))
    return dataclasses.replace(call, kwargs={**call.kwargs, "q": q, "k": k, "v": v})


def gated_delta_rule(call: Call) -> LazyOperator | None:
    """Read `*_gated_delta_rule(query, key, value, g, beta, ...)` and `*_kimi_delta_attention`."""
    return delta_rule(_renamed(call))


def _decay(layer: nn.Module, site: CallSite) -> DecayHandle:
    read = delta_decay(layer, site).read
    write = write_arguments(lambda call: ("g", "beta", "key"))
    return DecayHandle(existing(layer, *_PARAMETERS), site, lambda call: read(_renamed(call)), write)


def _alpha(layer: nn.Module) -> AlphaHandle | None:
    """log A = -exp(A_log) softplus(.); with a lower bound A_log stands inside a sigmoid and scales nothing."""
    gate = getattr(layer, "forget_gate", layer)
    bounded = any(value not in (None, False) for name, value in vars(gate).items() if "safe" in name or "bound" in name)
    if bounded or not isinstance(getattr(gate, "A_log", None), Tensor):
        return None
    return AlphaHandle("A_log" if gate is layer else "forget_gate.A_log", 1.0)


ADAPTERS = (
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
    ),
)
