"""How other people's layers are read. Each module adds its families; none imports the library it knows."""

from ess_monitor.capture.adapters import (
    attention,
    convolution,
    delta,
    fla_delta,
    gated_linear,
    lightning,
    mamba,
    mamba2,
    rg_lru,
    rwkv4,
    torch_attention,
)

__all__ = [
    "attention",
    "convolution",
    "delta",
    "fla_delta",
    "gated_linear",
    "lightning",
    "mamba",
    "mamba2",
    "rg_lru",
    "rwkv4",
    "torch_attention",
]
