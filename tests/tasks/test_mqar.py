"""Recall: questions have answers, and stand where the power law puts them."""

from __future__ import annotations

import pytest
import torch

from ess_monitor.errors import ConfigError
from ess_monitor.tasks import MQAR, MQARConfig

SETTINGS = [(32, 4, 32), (64, 16, 34), (64, 16, 35), (128, 8, 8192), (8, 2, 6)]


@pytest.mark.parametrize(("length", "pairs", "vocab"), SETTINGS)
def test_every_key_is_asked_once_and_answered_by_the_value_beside_it(length: int, pairs: int, vocab: int) -> None:
    samples = MQAR(MQARConfig(length=length, kv_pairs=pairs, vocab_size=vocab)).batch(range(100))
    for tokens, answers in zip(*(part.tolist() for part in samples), strict=True):
        memory = {}
        for place in range(0, 2 * pairs, 2):
            memory[tokens[place]] = tokens[place + 1]
        assert len(memory) == len(set(memory.values())) == pairs
        assert all(1 <= key < vocab // 2 <= value < vocab for key, value in memory.items())
        asked = [place for place in range(length) if answers[place] != -100]
        assert sorted(tokens[place] for place in asked) == sorted(memory)
        assert all(answers[place] == memory[tokens[place]] for place in asked)
        assert all(place >= 2 * pairs and place % 2 == 0 for place in asked)
        assert all(tokens[place] == 0 for place in range(2 * pairs, length) if place not in asked)


@pytest.mark.parametrize("power", [0.1, 0.5, 1.0])
def test_places_of_a_single_query_follow_the_power_law(power: float) -> None:
    samples, places = 20_000, 15
    data = MQAR(MQARConfig(length=2 + 2 * places, kv_pairs=1, vocab_size=8, power=power, samples=samples))
    targets = data.batch(range(samples))[1]
    counts = (targets[:, 2::2] != -100).sum(0).double()
    weights = torch.arange(1, places + 1, dtype=torch.float64) ** (power - 1)
    expected = samples * weights / weights.sum()
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 36.1, "99.9 % quantile for 14 degrees of freedom"


def test_several_queries_are_weighted_draws_without_putting_back() -> None:
    samples, power = 40_000, 0.1
    data = MQAR(MQARConfig(length=12, kv_pairs=2, vocab_size=8, power=power, samples=samples))
    inputs = data.batch(range(samples))[0]
    place = [(inputs[:, 4::2] == inputs[:, key, None]).double().argmax(1) for key in (0, 2)]
    counts = torch.zeros(4, 4, dtype=torch.float64)
    counts.index_put_(tuple(place), torch.ones(samples, dtype=torch.float64), accumulate=True)
    weights = torch.arange(1, 5, dtype=torch.float64) ** (power - 1)
    share = weights / weights.sum()
    expected = samples * share[:, None] * share[None] / (1 - share[:, None])
    expected.fill_diagonal_(0)
    off_diagonal = ~torch.eye(4, dtype=torch.bool)
    assert counts.diagonal().sum() == 0
    chi_squared = ((counts - expected) ** 2 / expected)[off_diagonal].sum()
    assert chi_squared < 31.3, "99.9 % quantile for 11 degrees of freedom"


def test_keys_and_values_are_uniform_at_every_place_and_independent_of_each_other() -> None:
    samples, pairs, vocab = 20_000, 3, 12
    inputs = MQAR(MQARConfig(length=12, kv_pairs=pairs, vocab_size=vocab, samples=samples)).batch(range(samples))[0]
    for place in range(2 * pairs):
        first, last = (vocab // 2, vocab) if place % 2 else (1, vocab // 2)
        counts = torch.bincount(inputs[:, place], minlength=vocab)[first:last].double()
        expected = samples / (last - first)
        assert ((counts - expected) ** 2 / expected).sum() < 20.5, f"99.9 % quantile at place {place}"
    together = torch.zeros(5, 6, dtype=torch.float64)
    ones = torch.ones(samples, dtype=torch.float64)
    together.index_put_((inputs[:, 0] - 1, inputs[:, 1] - 6), ones, accumulate=True)
    expected = samples / 30
    assert ((together - expected) ** 2 / expected).sum() < 58.3, "99.9 % quantile for 29 degrees of freedom"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 31, "kv_pairs": 4}, "length=31 must be even"),
        ({"length": 30, "kv_pairs": 8}, r"kv_pairs=8 needs length >= 4 \* kv_pairs = 32.*at most 7 pairs"),
        ({"length": 64, "kv_pairs": 16, "vocab_size": 33}, "has 15 keys.*kv_pairs=16; take at least 34"),
        ({"power": 0.0}, "greater than 0"),
        ({"power": 1.5}, "less than or equal to 1"),
        ({"kv_pairs": 0}, "greater than or equal to 1"),
    ],
)
def test_tasks_that_cannot_be_are_refused_with_the_way_out(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MQARConfig(**settings)


def test_the_hardest_allowed_setting_has_a_query_at_every_place() -> None:
    targets = MQAR(MQARConfig(length=32, kv_pairs=8, vocab_size=18)).batch(range(20))[1]
    assert (targets[:, 16::2] != -100).all()


def test_random_fillers_are_uniform_and_change_nothing_that_is_asked() -> None:
    samples = 4000
    plain = MQAR(MQARConfig(length=32, kv_pairs=4, vocab_size=16, samples=samples)).batch(range(samples))
    filled = MQAR(MQARConfig(length=32, kv_pairs=4, vocab_size=16, samples=samples, random_fillers=True))
    inputs, targets = filled.batch(range(samples))
    assert torch.equal(targets, plain[1])
    is_filler = plain[0] == 0
    assert torch.equal(inputs[~is_filler], plain[0][~is_filler])
    counts = torch.bincount(inputs[is_filler], minlength=16).double()
    expected = counts.sum() / 16
    assert ((counts - expected) ** 2 / expected).sum() < 37.7, "99.9 % quantile for 15 degrees of freedom"
