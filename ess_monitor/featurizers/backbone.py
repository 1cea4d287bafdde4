"""Builds a small pre-norm backbone for the paper's experiments: sequence mixers and channel mixers in turn.

Shapes: B batch, L length, D width, F hidden width of the channel mixer.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn

from ess_monitor import validation
from ess_monitor.errors import ConfigError, OperatorError
from ess_monitor.featurizers.parts import LARGEST_SIZE, RMSNorm
from ess_monitor.featurizers.registry import build_mixer, check_options, options_of
from ess_monitor.validation.settings import Settings

_INDEX_DTYPES = (torch.int64, torch.int32)  # those that an embedding accepts


class BackboneConfig(Settings):
    """Sets the parts of a `Backbone`. The defaults are the smallest net that shows the paper's phenomena on MQAR.

    Examples:
        >>> BackboneConfig(vocab_size=32, featurizer=("gla", "sa"), mixer_options={"beta": 1.0}).featurizers
        ('gla', 'sa')
    """

    model_config = ConfigDict(allow_inf_nan=False)

    vocab_size: int = Field(ge=1, le=2**31 - 1)
    """Tokens of the task, including special ones."""
    width: int = Field(default=32, ge=1, le=LARGEST_SIZE)
    """Channels. 32 is enough for vocabularies of tens; the paper sweeps 64 to 512."""
    depth: int = Field(default=2, ge=1, le=LARGEST_SIZE)
    """Blocks of one sequence and one channel mixer. The paper's nets have two: recall needs a pair of layers."""
    featurizer: str | tuple[str, ...] = "gla"
    """A key of `FEATURIZERS` for all blocks, or one per block for a hybrid."""
    num_heads: int = Field(default=2, ge=1, le=LARGEST_SIZE)
    """Heads of the head-based featurizers; must divide the width."""
    state_size: int = Field(default=16, ge=1, le=LARGEST_SIZE)
    """TSS per channel of every mixer. The default is the width per head, which is the paper's expansion of 1."""
    mlp: Literal["swiglu", "mlp"] = "swiglu"
    """Channel mixer: gated with SiLU, or two layers with GELU."""
    mlp_factor: int = Field(default=2, ge=1, le=LARGEST_SIZE)
    """Hidden width of the channel mixer as a multiple of the width."""
    decoder: Literal["every_token", "last_token"] = "every_token"
    """Logits of a position from its own features, or all of them from the last position's: the compression task."""
    mixer_options: dict[str, int | float] = Field(default={})
    """Options of the featurizers (`beta`, `alpha`, `rope_base`, ...). In a hybrid each goes to the blocks that
    have it."""

    @model_validator(mode="after")
    def _check(self) -> BackboneConfig:
        if isinstance(self.featurizer, tuple) and len(self.featurizer) != self.depth:
            raise ValueError(
                f"featurizer names {len(self.featurizer)} mixers for depth={self.depth} blocks; "
                "give one per block, or a single name for all."
            )
        try:
            check_options(self.featurizers, self.mixer_options)
        except ConfigError as error:
            raise ConfigError(f"mixer_options: {error}") from None
        return self

    @property
    def featurizers(self) -> tuple[str, ...]:
        """The featurizer of every block."""
        return self.featurizer if isinstance(self.featurizer, tuple) else (self.featurizer,) * self.depth


class Backbone(nn.Module):
    """Maps tokens to logits: embedding, `depth` blocks, norm, linear head.

    `backbone.blocks[i].mixer` is the sequence mixer of block i; it maps (batch, length, width) to the same shape and
    can be called on its own.

    Raises:
        ConfigError: A mixer cannot be built with these sizes.

    Examples:
        >>> import torch
        >>> backbone = Backbone(BackboneConfig(vocab_size=32, featurizer="wla", mixer_options={"beta": 1.0}))
        >>> backbone(torch.randint(32, (4, 20))).shape
        torch.Size([4, 20, 32])
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        validation.instance("config", config, BackboneConfig, hint="Backbone(BackboneConfig(vocab_size=...))")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        # Vectors of norm 1. In the collapse setting (WLA, beta 1) most nets recover by themselves with larger ones
        # (torch: entries of variance 1); with smaller ones (0.02) some do not recover even under the regularizer.
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        self.blocks = nn.ModuleList(Block(config, name) for name in config.featurizers)
        self.decoder = LastTokenDecoder(config.width) if config.decoder == "last_token" else nn.Identity()
        self.norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Map (batch, length) int64 to logits (batch, length, vocab_size).

        Raises:
            OperatorError: `tokens` has another shape or is not of integers.
        """
        if (
            not isinstance(tokens_BL, Tensor)
            or tokens_BL.dim() != 2
            or tokens_BL.dtype not in _INDEX_DTYPES
            or not tokens_BL.shape[1]
        ):
            raise OperatorError(
                f"tokens is {validation.shown(tokens_BL)}; expected integers (torch.int64 or torch.int32) of shape "
                "(batch, length). To feed features, call `backbone.blocks[i].mixer` with (batch, length, width)."
            )
        x_BLD = self.embedding(tokens_BL)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        logits: Tensor = self.head(self.norm(self.decoder(x_BLD)))
        return logits


class Block(nn.Module):
    """Computes x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: BackboneConfig, featurizer: str) -> None:
        super().__init__()
        known = options_of(featurizer)
        options = {name: value for name, value in config.mixer_options.items() if name in known}
        self.mixer_norm = RMSNorm(config.width)
        self.mixer = build_mixer(featurizer, config.width, config.num_heads, config.state_size, **options)
        self.mlp_norm = RMSNorm(config.width)
        hidden = config.mlp_factor * config.width
        self.mlp = SwiGLU(config.width, hidden) if config.mlp == "swiglu" else MLP(config.width, hidden)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return (B, L, D)."""
        x_BLD = x_BLD + self.mixer(self.mixer_norm(x_BLD))
        mixed: Tensor = x_BLD + self.mlp(self.mlp_norm(x_BLD))
        return mixed


class SwiGLU(nn.Module):
    """Computes W_out (silu(W_gate x) * W_in x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_and_in = nn.Linear(width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return (B, L, D)."""
        gate_BLF, in_BLF = self.gate_and_in(x_BLD).chunk(2, dim=-1)
        y: Tensor = self.out(F.silu(gate_BLF) * in_BLF)
        return y


class MLP(nn.Module):
    """Computes W_out gelu(W_in x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.into = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return (B, L, D)."""
        y: Tensor = self.out(F.gelu(self.into(x_BLD)))
        return y


class LastTokenDecoder(nn.Module):
    """Decodes a sequence from its last position plus position codes, in two layers (MAD; Poli et al., 2024).

    The only way from an earlier token to its reconstruction leads through the memory at the last position. Position
    codes are sines and cosines of speeds from 1 down to 1/10000, so that any length can be decoded.

    Examples:
        >>> decoder = LastTokenDecoder(32)
        >>> features = torch.randn(1, 5, 32)
        >>> changed = features.clone()
        >>> changed[:, :-1] = 0
        >>> torch.equal(decoder(features), decoder(changed))
        True
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(
            RMSNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU()
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return (batch, length, width)."""
        half = (self.width + 1) // 2
        speed = torch.exp(torch.arange(half, device=x_BLD.device) * (-math.log(10000.0) / max(half - 1, 1)))
        angle = torch.arange(x_BLD.shape[1], device=x_BLD.device)[:, None] * speed
        position_LD = torch.cat([angle.sin(), angle.cos()], dim=-1)[:, : self.width].to(x_BLD.dtype)
        y: Tensor = self.layers(x_BLD[:, -1:] + position_LD)
        return y
