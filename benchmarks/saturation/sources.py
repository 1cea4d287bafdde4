"""Draws sequences that need a state of a known size: recall of pairs, and compression. Others come from the trust runs.

Shapes: N sequences, L length, P pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.trust import sources as trust
from benchmarks.trust.settings import SourceSettings
from ess_monitor.tasks import IGNORED, Compression, CompressionConfig

KEYS, VALUES = 8, 16
CONTENT = 8
"""Tokens of the compression task, the last one apart."""


@dataclass(frozen=True)
class SizedSettings(SourceSettings):
    """Settings of a source whose sequences need a state of a known size."""

    kind: Literal["pairs", "compression"] = "pairs"  # type: ignore[assignment]


class PairSource(trust.Source):
    """Asks for the value of every key after pairs of keys and values, with one token for a pair.

    One layer can solve it: it needs no look at the token before. Inputs: P pairs, then their keys in random order.
    """

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__(settings, KEYS * VALUES + KEYS)
        self.pairs = settings.kv_pairs
        self.entropy = math.log(VALUES)

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        key_NP = torch.rand(count, KEYS, generator=generator).argsort(1)[:, : self.pairs]
        value_NP = torch.randint(VALUES, key_NP.shape, generator=generator)
        order_NP = torch.rand(key_NP.shape, generator=generator).argsort(1)
        inputs_NL = torch.cat((key_NP * VALUES + value_NP, KEYS * VALUES + key_NP.gather(1, order_NP)), 1)
        targets_NL = torch.full_like(inputs_NL, IGNORED)
        targets_NL[:, self.pairs :] = value_NP.gather(1, order_NP)
        return inputs_NL.to(torch.int16), targets_NL.to(torch.int16)


class CompressionSource(trust.Source):
    """Asks for all tokens back, from the features at the last one (`ess_monitor.tasks.Compression`)."""

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__(settings, CONTENT + 1)
        self.entropy = math.log(CONTENT)

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        seed = int(torch.randint(2**40, (), generator=generator))
        config = CompressionConfig(length=self.length, vocab_size=self.vocabulary, samples=count, seed=seed)
        inputs_NL, targets_NL = Compression(config).batch(range(count))
        return inputs_NL.to(torch.int16), targets_NL.to(torch.int16)


def build_source(settings: SourceSettings, seed: int) -> Any:
    """Return the source of a run. Its `entropy` is the least possible loss where it is known, or that of guessing."""
    if isinstance(settings, SizedSettings):
        return PairSource(settings) if settings.kind == "pairs" else CompressionSource(settings)
    return trust.build_source(settings, seed)
