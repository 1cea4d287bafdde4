"""Adapters for the layers of other libraries. None of them imports the library it knows."""

from ess_monitor.capture.adapters import (
    convolution,
    fla_delta,
    gated_linear,
    lightning_attention,
    mamba,
    mamba2,
    rg_lru,
    rwkv4,
    torch_attention,
    transformers_attention,
    transformers_delta,
)

_MODULES = (
    convolution,
    gated_linear,
    fla_delta,
    lightning_attention,
    mamba,
    mamba2,
    rg_lru,
    rwkv4,
    transformers_attention,
    torch_attention,
    transformers_delta,
)
LAYER_ADAPTERS = tuple(adapter for module in _MODULES for adapter in module.ADAPTERS)
"""The first adapter that knows a layer reads it."""
