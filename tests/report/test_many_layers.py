"""Pages of many layers: sorted, grouped, folded, and small."""

from __future__ import annotations

import json
from pathlib import Path

from ess_monitor.analysis import AtLength, LayerLengths, LayerMinimalState, LengthProfile, MinimalStates, StateError
from ess_monitor.report import (
    load_history,
    render_comparison,
    render_length_profile,
    render_minimal_state,
    render_report,
)
from tests.report.helpers import Page, figures_of, finding, measurement, reading, rescued_run, run_info, write_log


def test_a_table_of_contents_leads_to_every_heading(tmp_path: Path) -> None:
    rescued = write_log(tmp_path / "rescued.jsonl", rescued_run())
    for html in (render_report(load_history(rescued)), render_comparison(load_history(rescued), load_history(rescued))):
        parsed = Page(html)
        headings = [attributes["id"] for attributes in parsed.of("h2")]
        links = [attributes["href"] for attributes in parsed.of("a")]
        assert links[1 : 1 + len(headings)] == [f"#{each}" for each in headings]


def test_like_findings_share_a_card(tmp_path: Path) -> None:
    layers = tuple(f"blocks.{index}" for index in range(9))
    found = tuple(finding(layer, 100 + 10 * k, reason=f"0.{k}") for k, layer in enumerate(layers[:7]))
    conditions = dict.fromkeys(layers, "healthy") | dict.fromkeys(layers[:7], "collapsed")
    measured = [measurement(200, layers, findings=(*found, finding(layers[7], 150, "saturated")),
                            conditions={**conditions, layers[7]: "saturated"})]  # fmt: skip
    html = render_report(load_history(write_log(tmp_path / "log.jsonl", measured, run_info(layers))))
    text = Page(html).text
    assert (
        "7 layers: blocks.0, blocks.1, blocks.2, blocks.3, blocks.4, blocks.5 and 1 more collapsed at the end" in text
    )
    assert html.partition("The run</h2>")[0].count('<section class="card') == 2, "the saturated layer has its own"
    assert "blocks.6: Step 160: healthy → collapsed: 0.6" in text


def test_two_hundred_layers_are_a_page_of_a_few_megabytes(tmp_path: Path) -> None:
    layers = tuple(f"model.layers.{index}.mixer" for index in range(200))
    positions, spectrum = tuple(range(1, 64)), tuple(1.0 / rank for rank in range(1, 33))
    ranks = tuple(range(1, 33))
    shown = [
        tuple(
            reading(layer, step, positions=positions, per_position=tuple(map(float, positions)), spectrum=spectrum,
                    spectrum_ranks=ranks)
            for layer in layers
        )
        for step in range(0, 400, 100)
    ]  # fmt: skip
    measured = [measurement(each[0].step, layers, readings=each) for each in shown]
    history = load_history(write_log(tmp_path / "log.jsonl", measured, run_info(layers)))
    html = render_report(history)
    assert len(html.encode()) < 4_000_000
    assert html.count(json.dumps([float(i) for i in positions], separators=(",", ":"))) == 1, "stored once"
    heat = figures_of(html)[0]
    assert heat["layout"]["height"] < 1300
    assert heat["data"][0]["y"][:2] == ["0.mixer", "1.mixer"], "the shared beginning is folded"
    assert "leave out model.layers. , with which all begin" in Page(html).text
    spectra = [
        each["layout"]["yaxis"]["range"] for each in figures_of(html) if each["layout"]["yaxis"]["type"] == "log"
    ]
    assert len(spectra) == 200
    assert spectra.count(spectra[0]) == 200, "neighbors have one axis"


def test_layers_without_a_finding_are_folded_away_when_there_are_many(tmp_path: Path) -> None:
    layers = tuple(f"blocks.{index}" for index in range(48))
    html = render_report(load_history(write_log(tmp_path / "deep.jsonl", rescued_run(layers), run_info(layers))))
    before, _, folded = html.partition("47 layers without a finding")
    assert before.count('<h3>blocks.47 <span class="pill') == 2, "in words, and as a card"
    assert folded.count("<h3>") == 47


def test_the_filter_of_an_analysis_finds_figures_and_tables_of_a_layer() -> None:
    names = tuple(f"blocks.{index}" for index in range(30))
    errors = tuple(StateError(size=size, floor=0.5**size, error=0.6**size) for size in range(4))
    layers = tuple(LayerMinimalState(layer=name, status="ok", rank=3, errors=errors) for name in names)
    parsed = Page(html := render_minimal_state(MinimalStates(model="Net", layers=layers)))
    assert parsed.unclosed == []
    assert [each.get("data-layer") for each in parsed.of("section")] == list(names)
    assert [each["data-layer"] for each in parsed.of("details") if "data-layer" in each] == list(names)
    shown, _, folded = html.partition("6 more figures</summary>")
    assert (shown.count("<figure>"), folded.count("<figure>")) == (24, 6)
    assert folded.index("The figures as tables</summary>") < folded.index("blocks.0: relative error")


def test_figures_of_one_layer_are_filtered_whatever_their_title_says() -> None:
    sizes = {"effective_size": 2.0, "entropy_size": 1.0, "state_capacity": 4.0, "undecayed_size": 3.0}
    at = tuple(AtLength(length=n, operators=1, decay_product_norm=0.5, **sizes) for n in (8, 16))
    layers = tuple(LayerLengths(layer=name, status="ok", lengths=at) for name in ("a", "b"))
    page = Page(
        render_length_profile(
            LengthProfile(model="Net", lengths=(8, 16), tolerance=1e-3, tolerance_scale="absolute", layers=layers)
        )
    )
    assert [each.get("data-layer") for each in page.of("section")] == ["a", "a", "b", "b"]
