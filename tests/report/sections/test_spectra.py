"""Spectra of a layer at the steps that show its changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ess_monitor.records import Action, Reading
from ess_monitor.report import RunHistory, load_history, render_report
from ess_monitor.report.sections.layers import layer_cards
from ess_monitor.report.sections.spectra import chosen_spectra, spectra_figure, spectra_table
from tests.report.helpers import LAYERS, Page, action, measurement, reading, run_info

LAYER = LAYERS[0]


def _reading(step: int, spectrum: tuple[float, ...] = (10.0, 0.1, 1e-4), **fields: Any) -> Reading:
    values = {"spectrum": spectrum, "spectrum_ranks": tuple(range(1, len(spectrum) + 1)), **fields}
    return reading(LAYER, step, **values)


def _history(readings: list[Reading], *actions: Action) -> RunHistory:
    measurements = tuple(measurement(each.step, readings=(each,)) for each in readings)
    return RunHistory(Path("log"), run_info(), measurements, actions=actions)


def _chosen(history: RunHistory) -> list[tuple[int, str]]:
    return [(reading.step, why) for why, reading in chosen_spectra(history, LAYER)]


def test_without_an_action_the_first_the_middle_and_the_last_are_shown() -> None:
    readings = [_reading(step) for step in range(0, 500, 100)]
    assert _chosen(_history(readings)) == [(0, "first"), (200, "middle"), (400, "last")]
    assert _chosen(_history(readings[:2])) == [(0, "first"), (100, "middle")]
    assert _chosen(_history(readings[:1])) == [(0, "first")]


def test_an_action_on_the_layer_shows_what_was_right_before_and_right_after_it() -> None:
    readings = [_reading(step) for step in range(0, 500, 100)]
    others = (action(LAYERS[1], 50), action(LAYER, 90, "dry_run"), action(LAYER, 400))
    assert _chosen(_history(readings, action(LAYER, 200), *others)) == [
        (0, "first"),
        (200, "before pull_to_identity"),
        (300, "after pull_to_identity"),
        (400, "last"),
    ]
    assert _chosen(_history(readings, action(LAYER, 10))) == [
        (0, "first"),
        (100, "after pull_to_identity"),
        (400, "last"),
    ]
    assert _chosen(_history(readings, action(LAYER, 402))) == [(0, "first"), (400, "before pull_to_identity")]


def test_readings_without_a_spectrum_are_passed_over() -> None:
    readings = [reading(LAYER, 0), _reading(100), _reading(200, status="nonfinite"), reading(LAYER, 300)]
    assert _chosen(_history(readings)) == [(100, "first")]
    assert _chosen(_history([reading(LAYER, 0)])) == []


def test_a_spectrum_is_drawn_on_a_logarithmic_axis_beside_the_tolerance() -> None:
    figure = spectra_figure(chosen_spectra(_history([_reading(0), _reading(100, (10.0, 1e-2, 0.0))]), LAYER))
    assert figure is not None
    assert [line["name"].split(":")[0] for line in figure.data] == [
        "step 0, first",
        "step 100, middle",
        "tolerance 0.001",
    ]
    assert [(line["x"], line["y"]) for line in figure.data] == [
        ([1, 2, 3], [10.0, 0.1, 1e-4]),
        ([1, 2], [10.0, 1e-2]),  # what is 0 has no place on the axis
        ([1, 3], [1e-3, 1e-3]),
    ]
    assert figure.layout["yaxis"]["type"] == "log"
    assert figure.layout["xaxis"]["title"]["text"] == "rank"


@pytest.mark.parametrize("spectrum", [(0.0, 0.0), (0.0,), (1.7e308, 5e-324), (3.0,)])
@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_any_spectrum_is_a_page(spectrum: tuple[float, ...], tolerance: float) -> None:
    history = _history([_reading(0, spectrum, tolerance=tolerance)])
    card = layer_cards(history)[LAYER]
    assert card.spectra is not None
    assert (len(card.figures) == 3) == (max(spectrum) > 0)
    assert Page(render_report(history)).unclosed == []


def test_the_table_has_every_rank_that_any_of_the_steps_has() -> None:
    thinned = _reading(100, (5.0, 0.25), spectrum_ranks=(1, 4))
    table = spectra_table(chosen_spectra(_history([_reading(0), thinned]), LAYER))
    assert table is not None
    assert table.columns == ("rank", "step 0, first", "step 100, middle")
    assert table.rows == (("1", "10", "5"), ("2", "0.1", "–"), ("3", "0.0001", "–"), ("4", "–", "0.25"))
    assert spectra_table(()) is None
    assert spectra_figure(()) is None


def test_a_real_run_has_its_spectra_on_the_page(real_log: Path) -> None:
    page = Page(render_report(load_history(real_log)))
    summaries = [
        each["aria-label"]
        for each in page.of("div")
        if each.get("class") == "plot" and each["aria-label"].startswith("Singular")
    ]
    assert len(summaries) == 2, "one for each layer"
    assert "step 0, first: " in summaries[0]
    assert "at rank 1" in summaries[0]
    assert page.text.count("The singular values as a table") == 2
