"""Documents: answers are those of the document at hand, and separators stand between documents."""

from __future__ import annotations

import pytest
import torch

from ess_monitor.errors import ConfigError
from ess_monitor.tasks import IGNORED, SEPARATOR, Documents, DocumentsConfig

SETTINGS = [{}, {"length": 41, "keys": 5, "values": 2, "keys_of_document": 5, "min_pairs": 1, "max_pairs": 20}]


def documents_of(tokens: list[int]) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for token in tokens:
        if token == SEPARATOR:
            found.append([])
        else:
            found[-1].append(token)
    return found


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("asks_all", [False, True])
def test_repeated_keys_are_asked_for_their_value_in_the_same_document(settings: dict[str, int], asks_all: bool) -> None:
    config = DocumentsConfig(**settings, asks_all=asks_all)
    inputs, targets = Documents(config).batch(range(60))
    for tokens, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        memory: dict[int, int] = {}
        place = 0
        for token, answer, after in zip(tokens, answers, [*tokens[1:], None], strict=True):
            is_asked = place % 2 == 0 and token in memory
            if is_asked:
                assert answer == memory[token]
            elif asks_all and after is not None:
                assert answer == after
            elif not asks_all:
                assert answer == IGNORED
            if token == SEPARATOR:
                memory, place = {}, 0
                continue
            if place % 2 == 0:
                assert 1 <= token <= config.keys
                key = token
            else:
                assert config.keys < token < config.vocab_size
                assert memory.setdefault(key, token) == token, "a key has one value in a document"
            place += 1


@pytest.mark.parametrize("settings", SETTINGS)
def test_lengths_and_numbers_of_keys_are_those_that_were_asked_for(settings: dict[str, int]) -> None:
    config = DocumentsConfig(**settings)
    whole = [d for row in Documents(config).batch(range(200))[0].tolist() for d in documents_of(row)[:-1]]
    assert {len(document) for document in whole} <= {2 * n for n in range(config.min_pairs, config.max_pairs + 1)}
    assert max(len(set(document[::2])) for document in whole) == config.keys_of_document


def test_documents_are_drawn_uniformly_and_independently() -> None:
    samples = 20_000
    config = DocumentsConfig(length=20, min_pairs=1, max_pairs=4, samples=samples)
    inputs = Documents(config).batch(range(samples))[0]
    first = (inputs == SEPARATOR).long().argmax(1)
    lengths = torch.bincount(first, minlength=9)[[2, 4, 6, 8]].double()
    assert lengths.sum() == samples
    assert ((lengths - samples / 4) ** 2 / (samples / 4)).sum() < 16.3, "99.9 % quantile for 3 degrees of freedom"
    second = inputs.gather(1, first[:, None] + torch.tensor([1, 2]))
    pairs = torch.stack([inputs[:, 0], inputs[:, 1], *second.unbind(1)])  # key and value of two documents
    for one, other in ((0, 1), (2, 3), (0, 2), (1, 3)):
        counts = torch.zeros(17, 17, dtype=torch.float64)
        counts.index_put_((pairs[one], pairs[other]), torch.ones(samples, dtype=torch.float64), accumulate=True)
        table = counts[counts.sum(1) > 0][:, counts.sum(0) > 0]
        assert table.shape == (8, 8)
        assert ((table - samples / 64) ** 2 / (samples / 64)).sum() < 103.5, "99.9 % quantile for 63"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_pairs": 8, "max_pairs": 6}, "max_pairs=6 must be at least min_pairs=8"),
        ({"length": 16}, r"max_pairs=10 needs length >= 2 \* max_pairs = 20.*at most 8 pairs"),
        ({"keys": 2}, "keys_of_document=3 must be at most keys=2"),
        ({"min_pairs": 1, "max_pairs": 2}, "keys_of_document=3 must be at most max_pairs=2"),
        ({"min_pairs": 0}, "greater than or equal to 1"),
    ],
)
def test_documents_that_cannot_be_are_refused_with_the_way_out(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DocumentsConfig(**settings)
