"""Compression (MAD; Poli et al., 2024).

Shapes: B batch, L length.
"""

from __future__ import annotations

from pydantic import Field, model_validator
from torch import Tensor

from ess_monitor import validation
from ess_monitor.tasks.base import IGNORED, SyntheticTask, TaskConfig
from ess_monitor.tasks.counter import random_bits


class CompressionConfig(TaskConfig):
    """Size and difficulty of a compression task.

    Example:
        >>> CompressionConfig(length=32, vocab_size=8).samples
        128000
    """

    vocab_size: int = Field(default=16, ge=2, le=2**31 - 1)
    """Tokens: the last one says "compress", the rest are content. The paper makes the task harder by more of them, from
    8 to 128; 16 is MAD's own default."""

    @model_validator(mode="after")
    def _check(self) -> CompressionConfig:
        if self.length < 2:
            raise ValueError(f"length={self.length} must be at least 2: some content and the token that ends it.")
        return self


class Compression(SyntheticTask):
    """Random tokens, then "compress": give all of them back from the features at the last position alone.

    Targets are the inputs, except at the last position, whose token is always the same. Train it in a backbone with
    `decoder="last_token"`: where each position answers for itself, it sees its own answer.

    Example:
        >>> import torch
        >>> inputs, targets = Compression(CompressionConfig(length=6, vocab_size=8))[0]
        >>> torch.equal(inputs[:-1], targets[:-1]), inputs[-1].item(), targets[-1].item()
        (True, 7, -100)
    """

    def __init__(self, config: CompressionConfig) -> None:
        validation.instance("config", config, CompressionConfig)
        super().__init__(config.samples)
        self.config = config

    def _generate(self, index_B: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        inputs_BL = random_bits(config.seed, index_B, config.length) % (config.vocab_size - 1)
        inputs_BL[:, -1] = config.vocab_size - 1
        targets_BL = inputs_BL.clone()
        targets_BL[:, -1] = IGNORED
        return inputs_BL, targets_BL
