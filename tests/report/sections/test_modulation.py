"""State modulation in the report: a line for each layer, and every tolerance in a table."""

from __future__ import annotations

from pathlib import Path

from ess_monitor.report import RunHistory, render_report
from ess_monitor.report.sections.layers import layer_cards
from ess_monitor.report.sections.modulation import modulation_figure, modulation_table
from tests.report.helpers import LAYERS, measurement, reading, run_info


def _history(*ratios: dict[str, tuple[tuple[float, float], ...]]) -> RunHistory:
    measurements = tuple(
        measurement(
            100 * k, readings=tuple(reading(name, 100 * k, modulation_ratio=each.get(name, ())) for name in LAYERS)
        )
        for k, each in enumerate(ratios)
    )
    return RunHistory(Path("log"), run_info(), measurements)


def test_there_is_a_line_for_each_layer_at_the_tolerance_that_shows_most() -> None:
    first, second = LAYERS
    early = {first: ((0.1, 0.0), (0.3, 0.0)), second: ((0.1, 0.9), (0.3, 0.0))}
    late = {first: ((0.1, 0.125), (0.3, 0.5)), second: ((0.1, 0.0), (0.3, 0.25))}
    history = _history(early, early, {}, late)
    figure = modulation_figure(history)
    assert figure is not None
    assert figure.title == "State modulation at separators, tau 0.3"
    assert [line["name"] for line in figure.data] == list(LAYERS)
    assert f"{first}: 0 at step 0, 0.5 at step 300, lowest 0, highest 0.5" in figure.summary
    table = modulation_table(history)
    assert table is not None
    assert table.columns == ("layer", "tau 0.1", "tau 0.3")
    assert table.rows == ((first, "0.125", "0.5"), (second, "0", "0.25"))
    page = render_report(history)
    assert "State modulation at separators" in page


def test_one_noisy_reading_does_not_choose_the_tolerance() -> None:
    steady, noisy = ((0.1, 0.5), (1.0, -0.5)), ((0.1, 0.5), (1.0, 0.75))
    history = _history(*[{LAYERS[0]: each} for each in (*[steady] * 7, noisy)])
    figure = modulation_figure(history)
    assert figure is not None
    assert figure.title.endswith("tau 0.1")


def test_without_separators_the_report_says_nothing_of_it() -> None:
    history = _history({}, {})
    assert modulation_figure(history) is None
    assert modulation_table(history) is None
    assert "modulation" not in render_report(history)


def test_the_card_of_a_layer_shows_its_size_over_the_tolerance() -> None:
    sizes = ((0.0, 9.0), (1e-4, 8.0), (1e-3, 4.0), (1e-2, 1.0))
    measurements = tuple(
        measurement(step, readings=(reading(LAYERS[0], step, effective_size_at=sizes),)) for step in (0, 100, 200, 300)
    )
    history = RunHistory(Path("log"), run_info(), measurements)
    figures = {figure.title: figure for figure in layer_cards(history)[LAYERS[0]].figures}
    figure = figures["ESS over the tolerance"]
    assert [line["name"] for line in figure.data] == ["step 0", "step 200", "step 300"]
    assert "8 at tau 0.0001, 1 at tau 0.01" in figure.summary
    assert figure.layout["xaxis"]["type"] == "log"
    assert figure.data[0]["x"] == [1e-4, 1e-3, 1e-2]
