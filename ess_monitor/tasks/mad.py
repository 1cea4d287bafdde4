"""Defines selective copying and compression (MAD; Poli et al., 2024).

Shapes: B batch, L length, K tokens to copy.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ess_monitor import validation
from ess_monitor.tasks.base import IGNORED, SyntheticTask, TaskConfig
from ess_monitor.tasks.counter import random_bits


class SelectiveCopyingConfig(TaskConfig):
    """Sets size and difficulty of a copying task.

    Examples:
        >>> SelectiveCopyingConfig(length=17, tokens_to_copy=8)
        Traceback (most recent call last):
        ...
        ess_monitor.errors.ConfigError: tokens_to_copy=8 needs length > 2 * tokens_to_copy + 1 = 17, but ...
    """

    tokens_to_copy: int = Field(default=8, ge=1, le=2**31 - 1)
    """Tokens to remember in order; 8 is the easiest setting of the paper's sweep."""
    vocab_size: int = Field(default=8192, ge=3, le=2**31 - 1)
    """Tokens: the last one says "copy now", the one before it is blank, the rest are content. 8192 in the paper."""
    ends_on_content: bool = False
    """Put each blank before a content token that is drawn for it, as MAD's own generator does: the last content token
    then stands right before "copy now", and gaps are of more equal size. Otherwise all choices of places are equally
    likely."""

    @model_validator(mode="after")
    def _check(self) -> SelectiveCopyingConfig:
        least = 2 * self.tokens_to_copy + 1
        if self.length <= least:
            raise ValueError(
                f"tokens_to_copy={self.tokens_to_copy} needs length > 2 * tokens_to_copy + 1 = {least}, but length is "
                f"{self.length}; take fewer tokens or a longer sequence."
            )
        return self


class SelectiveCopying(SyntheticTask):
    """Asks for the content in order, after content tokens among blanks, "copy now", and as many blanks.

    The places of the content are uniform over all choices of K places out of L - K - 1, unless `ends_on_content`.

    Examples:
        >>> config = SelectiveCopyingConfig(length=12, tokens_to_copy=3, vocab_size=10)
        >>> inputs, targets = SelectiveCopying(config)[0]
        >>> torch.equal(inputs[inputs < 8], targets[-3:]), inputs[-4:].tolist()
        (True, [9, 8, 8, 8])
    """

    def __init__(self, config: SelectiveCopyingConfig) -> None:
        validation.instance("config", config, SelectiveCopyingConfig)
        super().__init__(config.samples)
        self.config = config

    def _generate(self, index_B: Tensor) -> tuple[Tensor, Tensor]:
        config, copied = self.config, self.config.tokens_to_copy
        places = config.length - copied - 1
        bits = random_bits(config.seed, index_B, copied + places)
        content_BK = bits[:, :copied] % (config.vocab_size - 2)
        place_BK = bits[:, copied:].topk(copied).indices.sort().values
        if config.ends_on_content:
            before_BN = bits[:, 2 * copied :] % copied  # the content token that each blank stands before
            blanks_BK = torch.zeros_like(content_BK).scatter_add_(1, before_BN, torch.ones_like(before_BN))
            place_BK = torch.arange(copied) + blanks_BK.cumsum(1)
        inputs_BL = torch.full((len(index_B), config.length), config.vocab_size - 2)
        inputs_BL[:, places] = config.vocab_size - 1
        inputs_BL.scatter_(1, place_BK, content_BK)
        targets_BL = torch.full_like(inputs_BL, IGNORED)
        targets_BL[:, places + 1 :] = content_BK
        return inputs_BL, targets_BL


class CompressionConfig(TaskConfig):
    """Sets size and difficulty of a compression task.

    Examples:
        >>> CompressionConfig(length=32, vocab_size=8).samples
        128000
    """

    vocab_size: int = Field(default=16, ge=2, le=2**31 - 1)
    """Tokens: the last one says "compress", the rest are content. The paper makes the task harder by more of them, from
    8 to 128; 16 is MAD's own default."""
    asks_last: bool = False
    """Ask for the last token as well, as MAD's own targets do. It is always the same, so that an accuracy of 1 / L is
    had for nothing."""

    @model_validator(mode="after")
    def _check(self) -> CompressionConfig:
        if self.length < 2:
            raise ValueError(f"length={self.length} must be at least 2: some content and the token that ends it.")
        return self


class Compression(SyntheticTask):
    """Asks for random tokens back, from the features at a last token "compress" alone.

    Targets are the inputs, except at the last position, whose token is always the same (see `asks_last`). Train it in a
    backbone with `decoder="last_token"`: otherwise each position sees its own answer.

    Examples:
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
        if not config.asks_last:
            targets_BL[:, -1] = IGNORED
        return inputs_BL, targets_BL
