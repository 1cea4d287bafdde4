"""Models and layers of packages: those that are installed. `PACKAGES` names what a census of all of them needs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.census.item import Built, Item

PACKAGES = (
    "xlstm minGRU-pytorch x-transformers local-attention titans-pytorch performer-pytorch linear-attention-transformer "
    "linformer mega-pytorch gated-state-spaces-pytorch mambapy"
)

WIDTH, LENGTH = 32, 48
Model = Callable[[Any], nn.Module]
"""Takes the module and builds the model."""


def _tokens() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randint(0, 50, (2, LENGTH)),), {}


def _features() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(2, LENGTH, WIDTH),), {}


def _heads() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(torch.randn(2, 2, LENGTH, 16) for _ in range(3)), {}


def _xlstm(package: Any) -> nn.Module:
    config = package.xLSTMBlockStackConfig(
        mlstm_block=package.mLSTMBlockConfig(mlstm=package.mLSTMLayerConfig(num_heads=2, conv1d_kernel_size=4)),
        slstm_block=package.sLSTMBlockConfig(slstm=package.sLSTMLayerConfig(backend="vanilla", num_heads=2)),
        context_length=LENGTH,
        num_blocks=2,
        embedding_dim=WIDTH,
        slstm_at=[1],
    )
    return package.xLSTMBlockStack(config)


def _decoder(package: Any, **options: Any) -> nn.Module:
    layers = package.Decoder(dim=WIDTH, depth=1, heads=2, attn_dim_head=16, **options)
    return package.TransformerWrapper(num_tokens=50, max_seq_len=LENGTH, attn_layers=layers)


MODELS: dict[str, tuple[str, Model, Callable[[], Any]]] = {
    "xlstm stack": ("xlstm", _xlstm, _features),
    "minGRU minLM": ("minGRU_pytorch.minLM", lambda p: p.minLM(num_tokens=50, dim=WIDTH, depth=1), _tokens),
    "minGRU": ("minGRU_pytorch.minGRU", lambda p: p.minGRU(WIDTH), _features),
    "minLSTM": ("minGRU_pytorch.minLSTM", lambda p: p.minLSTM(WIDTH), _features),
    "x-transformers": ("x_transformers", _decoder, _tokens),
    "x-transformers flash": ("x_transformers", partial(_decoder, attn_flash=True), _tokens),
    "x-transformers memory keys": ("x_transformers", partial(_decoder, attn_num_mem_kv=4), _tokens),
    "x-transformers zero keys": ("x_transformers", partial(_decoder, attn_add_zero_kv=True), _tokens),
    "x-transformers normed q, k": ("x_transformers", partial(_decoder, attn_qk_norm=True), _tokens),
    "local attention": ("local_attention", lambda p: p.LocalAttention(16, causal=True, dim=16), _heads),
    "local transformer": (
        "local_attention",
        lambda p: p.LocalTransformer(
            num_tokens=50, dim=WIDTH, depth=1, causal=True, local_attn_window_size=16, max_seq_len=64
        ),
        _tokens,
    ),
    "titans memory": ("titans_pytorch", lambda p: p.NeuralMemory(dim=WIDTH, chunk_size=16), _features),
    "titans MAC": (
        "titans_pytorch",
        lambda p: p.MemoryAsContextTransformer(num_tokens=50, dim=WIDTH, depth=2, segment_len=16, heads=2, dim_head=16),
        _tokens,
    ),
    "performer": (
        "performer_pytorch",
        lambda p: p.PerformerLM(num_tokens=50, max_seq_len=64, dim=WIDTH, depth=1, heads=2, dim_head=16, causal=False),
        _tokens,
    ),
    "linear attention": (
        "linear_attention_transformer",
        lambda p: p.LinearAttentionTransformerLM(
            num_tokens=50, dim=WIDTH, heads=2, depth=1, max_seq_len=64, causal=True
        ),
        _tokens,
    ),
    "linformer": ("linformer", lambda p: p.Linformer(dim=WIDTH, seq_len=LENGTH, depth=1, heads=2, k=16), _features),
    "mega layer": ("mega_pytorch", lambda p: p.MegaLayer(dim=WIDTH, causal=True), _features),
    "mega": ("mega_pytorch", lambda p: p.Mega(num_tokens=50, dim=WIDTH, depth=1), _tokens),
    "gated state spaces": (
        "gated_state_spaces_pytorch",
        lambda p: p.GatedStateSpacesLM(num_tokens=50, dim=WIDTH, depth=1),
        _tokens,
    ),
    "mambapy Mamba": (
        "mambapy.mamba",
        lambda p: p.Mamba(p.MambaConfig(d_model=WIDTH, n_layers=1, pscan=False)),
        _features,
    ),
    "mambapy Mamba, parallel scan": (
        "mambapy.mamba",
        lambda p: p.Mamba(p.MambaConfig(d_model=WIDTH, n_layers=1)),
        _features,
    ),
}


def items() -> Iterator[Item]:
    """Yield the models whose packages are installed."""
    for name, (path, model, inputs) in MODELS.items():
        if importlib.util.find_spec(path.partition(".")[0]) is not None:
            yield Item("packages", name, partial(_built, path, model, inputs))


def _built(path: str, model: Model, inputs: Callable[[], Any]) -> Built:
    return Built(model(importlib.import_module(path)), inputs())
