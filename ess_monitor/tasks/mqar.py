"""Defines multi-query associative recall (Zoology; Arora et al., 2023).

Shapes: B batch, L length, K key-value pairs, G places for a query.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ess_monitor import validation
from ess_monitor.tasks.base import IGNORED, SyntheticTask, TaskConfig
from ess_monitor.tasks.counter import exponential, random_bits


class MQARConfig(TaskConfig):
    """Sets size and difficulty of a recall task.

    Examples:
        >>> MQARConfig(length=30, kv_pairs=8)
        Traceback (most recent call last):
        ...
        ess_monitor.errors.ConfigError: kv_pairs=8 needs length >= 4 * kv_pairs = 32, but length is 30; ...
    """

    kv_pairs: int = Field(default=8, ge=1, le=2**31 - 1)
    """Pairs to remember, all asked for once; 8 is the easiest setting of the paper's sweep."""
    vocab_size: int = Field(default=8192, ge=4, le=2**31 - 1)
    """Tokens: 0 fills, the rest of the first half are keys, the second half are values. 8192 in the paper."""
    power: float = Field(default=0.1, gt=0.0, le=1.0)
    """Exponent a of the distance law p(g) ~ g^(a - 1), the paper's "KV Dist. Const.": 1 is uniform, near 0 most queries
    come early. Zoology's own default is 0.01."""
    random_fillers: bool = False
    """Fill with random tokens of the whole vocabulary instead of 0, as Zoology's generator does by default. A filler
    may then equal a key or a value; nothing is asked there."""

    @model_validator(mode="after")
    def _check(self) -> MQARConfig:
        if self.length % 2:
            raise ValueError(f"length={self.length} must be even: keys and queries stand at even positions.")
        if 4 * self.kv_pairs > self.length:
            raise ValueError(
                f"kv_pairs={self.kv_pairs} needs length >= 4 * kv_pairs = {4 * self.kv_pairs}, but length is "
                f"{self.length}; take at most {self.length // 4} pairs or a longer sequence."
            )
        keys = self.vocab_size // 2 - 1
        if self.kv_pairs > keys:
            raise ValueError(
                f"vocab_size={self.vocab_size} has {keys} keys (vocab_size / 2 less the filler) for "
                f"kv_pairs={self.kv_pairs}; take at least {2 * self.kv_pairs + 2}."
            )
        return self


class MQAR(SyntheticTask):
    """Asks for the value of every key, after a list of key-value pairs.

    Inputs: k1 v1 k2 v2 ... kK vK, then fillers (0, or random tokens) with the keys at even places between them. The
    target at the position of a repeated key is its value. Keys and values are distinct within a sample. Place
    g = 1, 2, ... after the pairs has weight g^(power - 1); the keys draw their places in turn without replacement.

    Examples:
        >>> inputs, targets = MQAR(MQARConfig(length=12, kv_pairs=2, vocab_size=10))[0]
        >>> pairs = dict(zip(inputs[:4:2].tolist(), inputs[1:4:2].tolist()))
        >>> asked = targets != -100
        >>> [pairs[key] for key in inputs[asked].tolist()] == targets[asked].tolist()
        True
    """

    def __init__(self, config: MQARConfig) -> None:
        validation.instance("config", config, MQARConfig)
        super().__init__(config.samples)
        self.config = config
        places = (config.length - 2 * config.kv_pairs) // 2
        self._weight_G = torch.arange(1, places + 1, dtype=torch.float64) ** (config.power - 1)

    def _generate(self, index_B: Tensor) -> tuple[Tensor, Tensor]:
        config, pairs = self.config, self.config.kv_pairs
        half = config.vocab_size // 2
        bits = random_bits(config.seed, index_B, 4 * pairs + len(self._weight_G))
        token_bits, place_bits = torch.unflatten(bits[:, : 4 * pairs], 1, (2, 2, pairs)), bits[:, 4 * pairs :]
        tokens_B2K = distinct(token_bits[:, 0], token_bits[:, 1], torch.tensor([half - 1, config.vocab_size - half]))
        key_BK, value_BK = (tokens_B2K + torch.tensor([1, half])[:, None]).unbind(1)
        # Exponential clocks of rates w: the order in which they ring is that of weighted draws without replacement.
        place_BK = (exponential(place_bits) / self._weight_G).topk(pairs, largest=False).indices
        query_BK = 2 * pairs + 2 * place_BK
        inputs_BL = torch.zeros(len(index_B), config.length, dtype=torch.int64)
        if config.random_fillers:
            drawn = bits.shape[1]
            inputs_BL = random_bits(config.seed, index_B, drawn + config.length)[:, drawn:] % config.vocab_size
        inputs_BL[:, 0 : 2 * pairs : 2] = key_BK
        inputs_BL[:, 1 : 2 * pairs : 2] = value_BK
        inputs_BL.scatter_(1, query_BK, key_BK)
        return inputs_BL, torch.full_like(inputs_BL, IGNORED).scatter_(1, query_BK, value_BK)


def distinct(draw_bits_BSK: Tensor, order_bits_BSK: Tensor, size_S: Tensor) -> Tensor:
    """Return K different numbers out of 0 .. size - 1 in random order, for S sizes at a time.

    Floyd's method: K draws, however large the vocabulary is. It gives a uniform set in an order that is not, hence the
    second row of bits.
    """
    pairs = draw_bits_BSK.shape[-1]
    chosen_BSK = torch.empty_like(draw_bits_BSK)
    for done in range(pairs):
        largest_S = size_S - pairs + done
        draw_BS = draw_bits_BSK[..., done] % (largest_S + 1)
        taken_BS = (chosen_BSK[..., :done] == draw_BS[..., None]).any(-1)
        chosen_BSK[..., done] = torch.where(taken_BS, largest_S, draw_BS)
    return chosen_BSK.gather(-1, order_bits_BSK.argsort(-1))
