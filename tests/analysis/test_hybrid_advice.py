"""Advice for the layers of a hybrid: the numbers are those of `profile`, and each piece of advice has its reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from ess_monitor import profile
from ess_monitor.analysis import HybridAdvice, LayerAdvice, hybrid_advice
from ess_monitor.analysis.hybrids import DEFAULTS, _advised
from ess_monitor.capture import Captured, CaptureFailure
from ess_monitor.errors import EssMonitorError
from ess_monitor.featurizers import build_mixer
from ess_monitor.records import Reading
from ess_monitor.report import render_hybrid_advice
from tests.analysis.models import WIDTH, inputs, mixed, of_transformers, tokens
from tests.report.helpers import unwanted_scripts


def advice_for(*mixers: torch.nn.Module, length: int = 64) -> HybridAdvice:
    u = torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    return hybrid_advice(torch.nn.Sequential(*mixers).double(), u)


def mixer(name: str, state: int = 4) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_mixer(name, WIDTH, 2, state)


def test_the_numbers_are_those_of_profile_and_ranked_by_what_is_used() -> None:
    model, u = mixed(), inputs(48)
    readings = profile(model, u, config=DEFAULTS).readings
    result = hybrid_advice(model, u)
    assert (result.tolerance, result.tolerance_scale) == (0.1, "output")
    assert [info.name for info in result.skipped] == ["lstm"]
    for layer, reading in zip(result.layers, readings, strict=True):
        assert layer.effective_size == reading.effective_size
        assert layer.used_ratio == pytest.approx(reading.effective_size / reading.attainable_size)
        assert layer.retention_ratio == reading.retention_ratio
        assert layer.far_share_ratio == reading.far_share_ratio
        assert layer.largest_head == max(reading.per_head)
        assert layer.evidence
    assert [layer.mixer for layer in result.layers] == ["recurrence", "attention"]
    shares = {layer.rank: layer.used_ratio for layer in result.layers}
    assert shares[1] < shares[2]


def test_a_full_recurrence_is_told_apart_from_one_that_uses_little() -> None:
    forgetful = mixer("wla", 16)
    torch.nn.init.constant_(forgetful.decay_logit, -8.0)  # type: ignore[arg-type]
    full, little = advice_for(mixer("la")), advice_for(forgetful)
    [layer] = full.layers
    assert layer.used_ratio >= 0.95
    assert layer.advice.startswith("a larger state")
    [layer] = little.layers
    assert layer.used_ratio < 0.5
    assert layer.retention_ratio < 0.8
    assert layer.advice.startswith("check its decay")
    assert "no hybrid" in little.notes[1]


@pytest.mark.parametrize(
    ("operator", "place", "numbers", "advice"),
    [
        ("DiagonalRecurrence", 0, {"effective_size": 2.0, "retention_ratio": 0.9}, "try a smaller state, of 4 or more"),
        ("DeltaRecurrence", 0, {"effective_size": 2.0, "retention_ratio": 0.5}, "check its decay"),
        ("DiagonalRecurrence", 0, {"effective_size": 7.0, "retention_ratio": 0.9}, "keep its state"),
        ("DiagonalRecurrence", 1, {"effective_size": 9.8, "retention_ratio": 1.0}, "a larger state, or attention"),
        (
            "DiagonalRecurrence",
            0,
            {"effective_size": 9.8, "retention_ratio": 1.0},
            "a larger state may help; attention in",
        ),
        ("SoftmaxAttention", 1, {"effective_size": 2.0, "far_share_ratio": 0.5}, "try a recurrence with a state of 4"),
        ("SoftmaxAttention", 1, {"effective_size": 2.0, "far_share_ratio": 0.05}, "try a window of tokens"),
        ("SoftmaxAttention", 1, {"effective_size": 7.0, "far_share_ratio": 0.5}, "keep attention here"),
        ("Convolution", 1, {"effective_size": 2.0}, "no advice for this kind"),
    ],
)
def test_advice_follows_what_was_measured(operator: str, place: int, numbers: dict[str, float], advice: str) -> None:
    reading = Reading(
        step=0, layer="a", status="ok", attainable_size=10.0, state_capacity=12.0, per_head=(1.0, 3.2), **numbers
    )
    layer = _advised(reading, operator, 1, place)
    assert layer.advice.startswith(advice)
    assert layer.used_ratio == pytest.approx(numbers["effective_size"] / 10)
    assert layer.largest_head == 3.2


def test_attention_as_the_first_mixer_is_pointed_out() -> None:
    result = advice_for(mixer("sa"), mixer("sa"))
    assert ["first mixer" in " ".join(layer.evidence) for layer in result.layers] == [True, False]
    assert "Largest ESS among attention layers" in " ".join(result.notes)


def test_a_real_hybrid_gets_advice_for_each_of_its_mixers() -> None:
    result = hybrid_advice(of_transformers("bamba"), tokens(48))
    assert [layer.mixer for layer in result.layers] == ["recurrence", "attention"]
    assert {layer.rank for layer in result.layers} == {1, 2}
    assert all(layer.advice for layer in result.layers)
    assert not any("no hybrid" in note for note in result.notes)


def test_a_layer_without_a_reading_has_no_advice_but_a_reason() -> None:
    layers = hybrid_advice(mixed(), inputs(length=1)).layers
    assert {(layer.status, layer.advice, layer.rank) for layer in layers} == {("too_short", "", None)}
    assert all(layer.message for layer in layers)


def test_rows_and_page_show_every_layer() -> None:
    result = hybrid_advice(mixed(), inputs(48))
    hostile = LayerAdvice(layer="<script>", status="failed", message="<b>why</b>")
    result = result.model_copy(update={"layers": (*result.layers, hostile)})
    rows = result.rows()
    assert [row["layer"] for row in rows] == ["gla", "attention", "<script>"]
    assert "attainable" in rows[0]["evidence"]
    page = render_hybrid_advice(result)
    assert unwanted_scripts(page) == []
    assert page.count("<figure") == 1
    for text in ("&lt;b&gt;why", "Advice, not proof", "far share", result.layers[0].advice.replace("'", "&#39;")):
        assert text in page


def test_a_config_of_another_kind_is_refused() -> None:
    with pytest.raises(EssMonitorError, match="config"):
        hybrid_advice(mixed(), inputs(), config={"tolerance": 1})  # type: ignore[arg-type]


def test_layers_are_passed_through_the_progress() -> None:
    seen: list[str] = []

    def progress(items: Sequence[Captured | CaptureFailure]) -> Iterator[Captured | CaptureFailure]:
        for item in items:
            seen.append(item.layer.name)
            yield item

    hybrid_advice(mixed(), inputs(), progress=progress)
    assert seen == ["gla", "attention"]
    with pytest.raises(EssMonitorError, match="progress"):
        hybrid_advice(mixed(), inputs(), progress=3)  # type: ignore[arg-type]
