"""Selective copying and compression against their descriptions."""

from __future__ import annotations

import pytest
import torch

from ess_monitor.errors import ConfigError
from ess_monitor.tasks import Compression, CompressionConfig, SelectiveCopying, SelectiveCopyingConfig


@pytest.mark.parametrize(("length", "copied", "vocab"), [(18, 8, 10), (64, 8, 8192), (40, 1, 3), (4, 1, 5)])
def test_content_is_asked_back_in_order_after_the_copy_token(length: int, copied: int, vocab: int) -> None:
    data = SelectiveCopying(SelectiveCopyingConfig(length=length, tokens_to_copy=copied, vocab_size=vocab))
    blank, copy = vocab - 2, vocab - 1
    for inputs, targets in zip(*(part.tolist() for part in data.batch(range(100))), strict=True):
        content = [token for token in inputs if token < blank]
        assert len(content) == copied
        assert inputs.count(copy) == 1
        assert inputs.index(copy) == length - copied - 1
        assert inputs[length - copied :] == [blank] * copied
        assert targets == [-100] * (length - copied) + content


def test_content_is_uniform_in_value_and_place() -> None:
    samples = 20_000
    config = SelectiveCopyingConfig(length=14, tokens_to_copy=3, vocab_size=9, samples=samples)
    inputs, targets = SelectiveCopying(config).batch(range(samples))
    values = torch.bincount(targets[targets != -100], minlength=7).double()
    expected = samples * 3 / 7
    assert ((values - expected) ** 2 / expected).sum() < 22.5, "99.9 % quantile for 6 degrees of freedom"
    places = (inputs[:, :10] < 7).sum(0).double()
    expected = samples * 3 / 10
    assert ((places - expected) ** 2 / expected).sum() < 27.9, "99.9 % quantile for 9 degrees of freedom"


def test_too_many_tokens_to_copy_are_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"length > 2 \* tokens_to_copy \+ 1 = 17, but length is 17; take fewer"):
        SelectiveCopyingConfig(length=17, tokens_to_copy=8)
    assert SelectiveCopyingConfig(length=18, tokens_to_copy=8).length == 18


def test_compression_asks_for_its_own_random_content() -> None:
    samples, vocab = 5_000, 8
    config = CompressionConfig(length=20, vocab_size=vocab, samples=samples)
    inputs, targets = Compression(config).batch(range(samples))
    assert (inputs[:, -1] == vocab - 1).all()
    assert (targets[:, -1] == -100).all()
    assert torch.equal(inputs[:, :-1], targets[:, :-1])
    counts = torch.bincount(inputs[:, :-1].flatten(), minlength=vocab).double()
    expected = samples * 19 / 7
    assert counts[7] == 0
    assert ((counts[:7] - expected) ** 2 / expected).sum() < 22.5, "99.9 % quantile for 6 degrees of freedom"


def test_compression_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="length=1 must be at least 2"):
        CompressionConfig(length=1)


def test_blanks_stand_before_content_drawn_for_them_as_in_mads_generator() -> None:
    samples = 20_000
    config = SelectiveCopyingConfig(length=12, tokens_to_copy=3, vocab_size=9, samples=samples, ends_on_content=True)
    inputs, targets = SelectiveCopying(config).batch(range(samples))
    content = inputs[:, :8] < 7
    assert bool(content[:, 7].all())
    assert bool((content.sum(1) == 3).all())
    assert torch.equal(inputs[:, :8][content].reshape(-1, 3), targets[:, -3:])
    # Five blanks, each before one of three tokens: those before the first are binomial.
    before = content.int().argmax(1)
    counts = torch.bincount(before, minlength=6).double()
    binomial = torch.tensor([32, 80, 80, 40, 10, 1]).double() / 243 * samples
    assert ((counts - binomial) ** 2 / binomial).sum() < 20.5, "99.9 % quantile for 5 degrees of freedom"


def test_the_last_token_is_asked_where_that_is_set() -> None:
    inputs, targets = Compression(CompressionConfig(length=6, vocab_size=8, asks_last=True)).batch(range(20))
    assert torch.equal(inputs, targets)
