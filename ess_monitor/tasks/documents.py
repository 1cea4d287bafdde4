"""Defines recall in documents: what a key means changes after each separator (section 4.4).

Shapes: B batch, D documents of a row, P pairs of a document, K keys of a document, L length.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ess_monitor import validation
from ess_monitor.tasks.base import IGNORED, SyntheticTask, TaskConfig
from ess_monitor.tasks.counter import random_bits
from ess_monitor.tasks.mqar import distinct

SEPARATOR = 0
"""Token between two documents."""


class DocumentsConfig(TaskConfig):
    """Sets size and difficulty of recall in documents.

    Examples:
        >>> DocumentsConfig(length=64).vocab_size
        17
        >>> DocumentsConfig(min_pairs=8, max_pairs=6)
        Traceback (most recent call last):
        ...
        ess_monitor.errors.ConfigError: max_pairs=6 must be at least min_pairs=8.
    """

    keys: int = Field(default=8, ge=1, le=2**31 - 2)
    """Tokens that are keys, 1 .. keys."""
    values: int = Field(default=8, ge=1, le=2**31 - 2)
    """Tokens that are values, those after the keys."""
    keys_of_document: int = Field(default=3, ge=1, le=2**31 - 2)
    """Different keys of one document, and so what there is to remember. 3 leave most of a small state to spare."""
    min_pairs: int = Field(default=6, ge=1, le=2**31 - 2)
    """Key-value pairs of the shortest document."""
    max_pairs: int = Field(default=10, ge=1, le=2**31 - 2)
    """Pairs of the longest document. Lengths are uniform, so that no counting tells where a separator comes."""
    asks_all: bool = False
    """Ask for the next token everywhere, as a language model does, and not for the values of repeated keys alone."""

    @property
    def vocab_size(self) -> int:
        """Tokens: the separator 0, then keys, then values."""
        return 1 + self.keys + self.values

    @model_validator(mode="after")
    def _check(self) -> DocumentsConfig:
        if self.max_pairs < self.min_pairs:
            raise ValueError(f"max_pairs={self.max_pairs} must be at least min_pairs={self.min_pairs}.")
        if 2 * self.max_pairs > self.length:
            raise ValueError(
                f"max_pairs={self.max_pairs} needs length >= 2 * max_pairs = {2 * self.max_pairs}, but length is "
                f"{self.length}; take at most {self.length // 2} pairs or a longer sequence."
            )
        for name in ("keys", "max_pairs"):
            most = getattr(self, name)
            if self.keys_of_document > most:
                raise ValueError(f"keys_of_document={self.keys_of_document} must be at most {name}={most}.")
        return self


class Documents(SyntheticTask):
    """Asks for the value of every repeated key, in documents that each have a key-value map of their own.

    Inputs: k v k v ... k v, a separator (0), the next document, cut at `length`. A document draws its keys without and
    their values with replacement, and each pair one of its keys. The target at a key that was seen before in the same
    document is its value. What was seen before a separator is of no use after it: a layer that can tell may forget.

    Examples:
        >>> inputs, targets = Documents(DocumentsConfig(length=12, min_pairs=2, max_pairs=3))[0]
        >>> inputs.tolist(), targets[targets != -100].tolist()
        ([6, 12, 2, 12, 0, 2, 15, 7, 11, 7, 11, 0], [11])
    """

    def __init__(self, config: DocumentsConfig) -> None:
        validation.instance("config", config, DocumentsConfig)
        super().__init__(config.samples)
        self.config = config

    def _generate(self, index_B: Tensor) -> tuple[Tensor, Tensor]:
        config, batch = self.config, len(index_B)
        length = config.length + 1  # the last token is asked for, too
        documents, pairs, keys = -(-length // (2 * config.min_pairs + 1)), config.max_pairs, config.keys_of_document
        bits = random_bits(config.seed, index_B, documents * (1 + 3 * keys + pairs))
        sizes = [1, 2 * keys, keys, pairs]
        size_bits, key_bits, value_bits, slot_bits = bits.reshape(batch, documents, sum(sizes)).split_with_sizes(
            sizes, dim=2
        )
        pairs_BD = config.min_pairs + size_bits[..., 0] % (config.max_pairs - config.min_pairs + 1)
        drawn, order = key_bits.flatten(0, 1)[:, None].chunk(2, dim=-1)
        key_BDK = 1 + distinct(drawn, order, torch.tensor([config.keys])).reshape(batch, documents, keys)
        value_BDK = 1 + config.keys + value_bits % config.values
        slot_BDP = slot_bits % keys
        is_repeated_BDP = ((slot_BDP[..., None, :] == slot_BDP[..., None]).tril(-1)).any(-1)

        end_BD = (2 * pairs_BD + 1).cumsum(1)
        token_L = torch.arange(length).expand(batch, -1).contiguous()
        document_BL = torch.searchsorted(end_BD, token_L, right=True)
        inside_BL = token_L - (end_BD - 2 * pairs_BD - 1).gather(1, document_BL)
        is_separator_BL = inside_BL == 2 * pairs_BD.gather(1, document_BL)
        pair_BL = document_BL * pairs + (inside_BL // 2).clamp(max=pairs - 1)
        key_BL = key_BDK.gather(2, slot_BDP).flatten(1).gather(1, pair_BL)
        value_BL = value_BDK.gather(2, slot_BDP).flatten(1).gather(1, pair_BL)
        tokens_BL = torch.where(inside_BL % 2 == 0, key_BL, value_BL).masked_fill(is_separator_BL, SEPARATOR)

        inputs_BL, targets_BL = tokens_BL[:, :-1], tokens_BL[:, 1:]
        if not config.asks_all:
            is_key_BL = (inside_BL % 2 == 0) & ~is_separator_BL
            asked_BL = (is_key_BL & is_repeated_BDP.flatten(1).gather(1, pair_BL))[:, :-1]
            targets_BL = targets_BL.masked_fill(~asked_BL, IGNORED)
        return inputs_BL.contiguous(), targets_BL.contiguous()
