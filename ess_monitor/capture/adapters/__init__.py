"""Adapters for the layers of other libraries. None of them imports the library it knows."""

from ess_monitor.capture.adapters import (
    convolution,
    delta_rule,
    gated_linear,
    lightning_attention,
    mamba,
    mamba2,
    rg_lru,
    rwkv4,
    torch_attention,
    transformers_attention,
)

LAYER_ADAPTERS = (
    *convolution.ADAPTERS,
    *gated_linear.ADAPTERS,
    *delta_rule.ADAPTERS,
    *lightning_attention.ADAPTERS,
    *mamba.ADAPTERS,
    *mamba2.ADAPTERS,
    *rg_lru.ADAPTERS,
    *rwkv4.ADAPTERS,
    *transformers_attention.ADAPTERS,
    *torch_attention.ADAPTERS,
)
"""The first adapter that knows a layer reads it."""
