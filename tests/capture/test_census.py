"""A light part of the census: layers written small, in this process."""

from __future__ import annotations

import pytest

from benchmarks.census import own_layers
from benchmarks.census.item import Item, examine
from benchmarks.census.tables import page

ITEMS = tuple(own_layers.items())
EXPECTED = {
    "GatedMLP": "no mixer",
    "SoftExperts": "no mixer",
    "TemporalConvolution": "fully",
    "SpatialGate": "with inputs",
}


@pytest.mark.parametrize("item", ITEMS, ids=[item.name for item in ITEMS])
def test_a_layer_is_listed_with_a_reason_where_it_mixes_tokens(item: Item) -> None:
    outcome = examine(item)
    assert outcome.ran
    assert outcome.verdict == EXPECTED.get(item.name, "skipped"), outcome
    assert all(outcome.reasons.values())


def test_the_page_names_every_item_and_counts_it() -> None:
    outcomes = [examine(item) for item in ITEMS[:2]]
    text = page(outcomes, ["torch 2.13.0"], missing=7)
    assert "7 items are not made yet" in text
    assert "| written small | 0 | 0 | 2 |" in text
    assert all(item.name in text for item in ITEMS[:2])
