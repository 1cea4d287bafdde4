"""A light part of the census: layers written small, in this process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from benchmarks.census import own_layers
from benchmarks.census.item import Built, Item, examine
from benchmarks.census.model_inputs import inputs_on_which
from benchmarks.census.small_config import Shrink, shrunk
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
    text = page(outcomes, ["torch 2.13.0"], missing={"written small": ["SRU", "GRU"], "packages": ["minGRU"]})
    assert "Items not made yet: 3;" in text
    assert "**not made yet** (2): SRU, GRU" in text
    assert "| written small | 0 | 0 | 2 |" in text
    assert all(item.name in text for item in ITEMS[:2])


def needs_a_package() -> Built:
    raise ImportError("TimmBackbone requires the timm library but it was not found in your environment.")


def test_a_package_that_is_not_installed_is_an_outcome_with_its_name() -> None:
    outcome = examine(Item("transformers", "detr", needs_a_package))
    assert (outcome.verdict, outcome.problem) == ("no package", "needs timm")
    assert "**no package** (1): detr (needs timm)" in page([outcome], [], missing={})


class Settings(SimpleNamespace):
    """Looks like a configuration of transformers."""

    model_type = "small"

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


def test_a_configuration_is_made_small_with_its_parts_and_lists_and_keeps_its_kinds_of_layers() -> None:
    vision = Settings(hidden_size=1152, num_attention_heads=16, num_hidden_layers=27, patch_size=14, image_size=896)
    text = Settings(
        hidden_size=4096,
        num_attention_heads=32,
        num_hidden_layers=64,
        head_dim=None,
        num_experts=128,
        num_experts_per_tok=8,
        vocab_size=150_000,
        image_token_id=149_000,
        layer_types=["linear", "linear", "linear", "full"] * 16,
        rope_parameters={"mrope_section": [16, 24, 24], "rope_theta": 10_000},
        use_cache=True,
    )
    small = shrunk(Settings(text_config=text, vision_config=vision, depths=[2, 2, 18, 2]), Shrink(8, 2, 4))
    assert (small.text_config.hidden_size, small.text_config.num_attention_heads) == (512, 32)
    assert small.text_config.layer_types == ["linear", "full"]
    assert small.text_config.num_hidden_layers == 2
    assert (small.text_config.num_experts, small.text_config.num_experts_per_tok) == (4, 2)
    assert small.text_config.image_token_id < small.text_config.vocab_size == 400
    assert small.text_config.rope_parameters == {"mrope_section": [2, 3, 3], "rope_theta": 10_000}
    assert (small.vision_config.hidden_size, small.vision_config.patch_size, small.vision_config.image_size) == (
        144,
        14,
        224,
    )
    assert small.depths == [2, 2, 2, 2]
    fewer = shrunk(Settings(hidden_size=4096, num_attention_heads=32, head_dim=128), Shrink(8, 2, fewer_heads=True))
    assert (fewer.hidden_size, fewer.num_attention_heads, fewer.head_dim) == (512, 4, 128)


class Reader(nn.Module):
    """Takes an image and text with as many places as the image has patches, boxes, and features of one width."""

    main_input_name = "input_ids"

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, bbox: Tensor | None = None, states: Any = None
    ) -> Tensor:
        if bbox is None:
            raise ValueError("You have to specify bbox")
        places = int((input_ids == 7).sum())
        if pixel_values is not None and places != 36:
            raise ValueError(f"Image features and image tokens do not match, tokens: {places}, features: 36")
        if states is None:
            raise ValueError("`states` cannot be `None`")
        return nn.Linear(19, 2)(states)


def test_inputs_are_changed_as_errors_ask_for() -> None:
    config = Settings(image_token_id=7, vision_config=Settings(image_size=32, num_channels=1), state_dim=17)
    given = inputs_on_which(Reader(), config)
    assert sorted(given) == ["bbox", "input_ids", "pixel_values", "states"]
    assert given["pixel_values"].shape == (1, 1, 32, 32)
    assert (given["input_ids"] == 7).sum() == 36
    assert given["states"].shape[-1] == 19


class Words(nn.Module):
    """Takes words, and images in no form that is known."""

    main_input_name = "input_ids"

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        if pixel_values is not None:
            raise ValueError("too many values to unpack")
        return input_ids


def test_arguments_without_those_that_no_form_suits_are_tried_too() -> None:
    config = Settings(vlm_config=Settings(image_token_id=7, image_size=32), num_channels=3)
    assert list(inputs_on_which(Words(), config)) == ["input_ids"]


def test_the_token_of_an_image_is_found_in_a_part_of_the_configuration() -> None:
    parts = Settings(image_token_id=7, vision_config=Settings(image_size=32, num_channels=1), state_dim=17)
    given = inputs_on_which(Reader(), Settings(vlm_config=parts))
    assert (given["input_ids"] == 7).sum() == 36
