"""How other people's layers are read. Each module adds its layers' adapters; none imports the library it knows."""

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

__all__ = [
    "convolution",
    "fla_delta",
    "gated_linear",
    "lightning_attention",
    "mamba",
    "mamba2",
    "rg_lru",
    "rwkv4",
    "torch_attention",
    "transformers_attention",
    "transformers_delta",
]
