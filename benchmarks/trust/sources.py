"""Draws the sequences of a run: local text, Markov sources, copying, recall, tokens without memory.

Shapes: N sequences, L length, V vocabulary, C contexts.
"""

from __future__ import annotations

import math
import re
import sys
from abc import ABC, abstractmethod
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.trust.settings import SourceSettings
from ess_monitor.tasks import IGNORED, MQAR, MQARConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from corpus import read_corpus

TEXT_VOCABULARY, TOKEN_VOCABULARY, RECALL_VOCABULARY = 32, 16, 32
SHARPNESS = 1.5
"""Standard deviation of the logits of a Markov source. Its entropy is then about three quarters of the largest."""
BURN_IN = 16
"""Tokens of a Markov source that are drawn and dropped, so that sequences begin anywhere."""
CHUNK = 4096
"""Sequences that are drawn at once: a limit on memory."""


class Source(ABC):
    """Draws sequences of inputs and targets. A target of -100 is not asked."""

    def __init__(self, settings: SourceSettings, vocabulary: int) -> None:
        self.length, self.vocabulary = settings.length, vocabulary
        self.entropy = math.log(vocabulary)
        """Least possible loss in nats where it is known, otherwise the loss of guessing."""

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, both (count, length) int16."""
        generator = torch.Generator().manual_seed(seed)
        chunks = [self._draw(min(CHUNK, count - done), generator) for done in range(0, count, CHUNK)]
        inputs_NL, targets_NL = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        return inputs_NL, targets_NL

    @abstractmethod
    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return one chunk."""


class MarkovSource(Source):
    """Predicts the next token of a source in which the last `order` tokens decide it."""

    def __init__(self, settings: SourceSettings, probability_CV: Tensor, order: int) -> None:
        super().__init__(settings, probability_CV.shape[1])
        self.probability_CV, self.order = probability_CV, order
        contexts_NL, tokens_NL = self._walk(CHUNK, torch.Generator().manual_seed(0))
        self.entropy = float(-probability_CV[contexts_NL, tokens_NL].log().mean())

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        _, tokens_NL = self._walk(count, generator)
        tokens_NL = tokens_NL.to(torch.int16)
        return tokens_NL[:, :-1], tokens_NL[:, 1:]

    def _walk(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return contexts and tokens, both (count, length + 1)."""
        size = len(self.probability_CV)
        context_N = torch.randint(size, (count,), generator=generator)
        contexts, tokens = [], []
        for _ in range(BURN_IN + self.length + 1):
            token_N = torch.multinomial(self.probability_CV[context_N], 1, generator=generator)[:, 0]
            contexts.append(context_N)
            tokens.append(token_N)
            context_N = (context_N * self.vocabulary + token_N) % size
        return torch.stack(contexts[BURN_IN:], 1), torch.stack(tokens[BURN_IN:], 1)


class WindowSource(Source):
    """Predicts the next symbol of windows of the text itself."""

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__(settings, TEXT_VOCABULARY)

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        text = symbols()
        start_N = torch.randint(len(text) - self.length, (count,), generator=generator)
        windows_NL = text[start_N[:, None] + torch.arange(self.length + 1)].to(torch.int16)
        return windows_NL[:, :-1], windows_NL[:, 1:]


class CopySource(Source):
    """Asks for the token `back` places before, of random tokens."""

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__(settings, TOKEN_VOCABULARY)
        self.back = settings.back

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs_NL = torch.randint(self.vocabulary, (count, self.length), generator=generator, dtype=torch.int16)
        targets_NL = torch.full_like(inputs_NL, IGNORED)
        targets_NL[:, self.back :] = inputs_NL[:, : -self.back]
        return inputs_NL, targets_NL


class MemorylessSource(Source):
    """Predicts the next of independent tokens of a fixed distribution: there is nothing to remember."""

    def __init__(self, settings: SourceSettings, seed: int) -> None:
        super().__init__(settings, TOKEN_VOCABULARY)
        logits_V = torch.randn(self.vocabulary, generator=torch.Generator().manual_seed(seed))
        self.probability_V = logits_V.softmax(0)
        self.entropy = float(-(self.probability_V * self.probability_V.log()).sum())

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = torch.multinomial(self.probability_V, count * (self.length + 1), replacement=True, generator=generator)
        tokens_NL = drawn.reshape(count, -1).to(torch.int16)
        return tokens_NL[:, :-1], tokens_NL[:, 1:]


class RecallSource(Source):
    """Asks for the values of keys (`ess_monitor.tasks.MQAR`)."""

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__(settings, RECALL_VOCABULARY)
        self.kv_pairs = settings.kv_pairs

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        seed = int(torch.randint(2**40, (), generator=generator))
        config = MQARConfig(
            length=self.length, kv_pairs=self.kv_pairs, vocab_size=self.vocabulary, samples=count, seed=seed
        )
        inputs_NL, targets_NL = MQAR(config).batch(range(count))
        return inputs_NL.to(torch.int16), targets_NL.to(torch.int16)


def build_source(settings: SourceSettings, seed: int) -> Source:
    """Return the source; a Markov or memoryless one has a table that depends on the seed."""
    if settings.kind == "text":
        return MarkovSource(settings, text_table(settings.order), settings.order)
    if settings.kind == "markov":
        table_seed = 1000 * seed + settings.stream
        return MarkovSource(settings, random_table(settings.order, table_seed), settings.order)
    if settings.kind == "memoryless":
        return MemorylessSource(settings, seed)
    if settings.kind == "windows":
        return WindowSource(settings)
    return CopySource(settings) if settings.kind == "copy" else RecallSource(settings)


def random_table(order: int, seed: int) -> Tensor:
    """Return random probabilities of the next token, (contexts, vocabulary)."""
    generator = torch.Generator().manual_seed(seed)
    logits_CV = SHARPNESS * torch.randn(TOKEN_VOCABULARY**order, TOKEN_VOCABULARY, generator=generator)
    return logits_CV.softmax(-1)


@lru_cache(maxsize=1)
def symbols() -> Tensor:
    """Return the corpus as symbols, int64: 0 for white space, 1 to 26 for letters, 27 to 31 for the rest."""
    text = re.sub(r"\s+", " ", read_corpus().decode("utf-8", "ignore").lower())
    text = "".join(character for character in text if " " <= character <= "~")
    table_V = torch.full((128,), 31)
    table_V[ord(" ")] = 0
    table_V[ord("a") : ord("z") + 1] = torch.arange(1, 27)
    table_V[ord("0") : ord("9") + 1] = 27
    for symbol, character in enumerate(".,-", start=28):
        table_V[ord(character)] = symbol
    return table_V[torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8).long()]


def text_table(order: int) -> Tensor:
    """Return the probabilities of the next symbol after `order` symbols of the corpus, (contexts, vocabulary).

    Sequences that are drawn from it look like text within `order` symbols, and have no memory beyond.
    """
    text = symbols()
    context_N = torch.zeros(len(text) - order, dtype=torch.int64)
    for place in range(order):
        context_N = context_N * TEXT_VOCABULARY + text[place : len(text) - order + place]
    contexts = TEXT_VOCABULARY**order
    pair_N = context_N * TEXT_VOCABULARY + text[order:]
    counts_CV = torch.bincount(pair_N, minlength=contexts * TEXT_VOCABULARY).reshape(contexts, -1).float()
    # A context that never occurs goes on like the text as a whole.
    overall_V = torch.bincount(text, minlength=TEXT_VOCABULARY) / len(text)
    counts_CV += 1e-3 * overall_V
    return counts_CV / counts_CV.sum(-1, keepdim=True)
