"""Where things lie in a figure, and that Plotly knows everything that figures say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ess_monitor.records import COLOR_SCALE, CONDITIONS
from ess_monitor.report import RunHistory
from ess_monitor.report.components import event_rows, marks
from ess_monitor.report.figures import STYLES, Figure, Mark, Series, condition_color, line_figure, share_values, thin
from ess_monitor.report.heat_map import COLUMNS, HeatRow, heat_figure
from ess_monitor.report.labels import short_names
from ess_monitor.report.sections.utilization import ratio_figure
from tests.report.helpers import HOSTILE, LAYERS, finding, measurement, reading, rescued_run, run_info

RISING = Series("s", "a", [(0, 0.0), (50, 1.0), (100, 2.0)])


def _drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


def _history(measurements: list) -> RunHistory:  # type: ignore[type-arg]
    return RunHistory(
        Path("log"),
        run_info(),
        tuple(measurements),
        tuple(found for each in measurements for found in each.findings),
        tuple(done for each in measurements for done in each.actions),
    )


def _utilization(measurements: list) -> Figure:  # type: ignore[type-arg]
    return _drawn(ratio_figure(_history(measurements), "utilization_ratio", "t"))


def test_a_line_has_its_values_and_its_words() -> None:
    figure = _drawn(line_figure("t", {"": [RISING]}, x_range=(0.0, 100.0)))
    (line,) = figure.data
    assert (line["x"], line["y"], line["name"]) == ([0, 50, 100], [0.0, 1.0, 2.0], "s")
    assert figure.layout["xaxis"]["range"] == [0, 100]
    assert figure.summary == "s: 0 at step 0, 2 at step 100, lowest 0, highest 2"


def test_panels_lie_below_each_other_over_one_axis() -> None:
    other = Series("other", "b", [(0, 5.0)])
    figure = _drawn(line_figure("t", {"top": [RISING], "empty": [Series("none", "a", [])], "bottom": [other]}))
    assert [line.get("yaxis", "y") for line in figure.data] == ["y", "y2"]
    assert {line.get("xaxis", "x") for line in figure.data} == {"x"}
    top, bottom = (figure.layout[axis] for axis in ("yaxis", "yaxis2"))
    assert (top["title"]["text"], bottom["title"]["text"]) == ("top", "bottom")
    assert bottom["domain"][0] == pytest.approx(0)
    assert bottom["domain"][1] < top["domain"][0] < top["domain"][1] == 1
    assert "bottom, other: 5 at step 0" in figure.summary


def test_lines_of_all_panels_share_the_entries_of_the_legend() -> None:
    pairs = [(0, 1.0), (1, 2.0)]
    panels = {name: [Series("A", "a", pairs), Series("B", "b", pairs)] for name in ("loss", "accuracy")}
    drawn = _drawn(line_figure("t", panels)).data
    assert [(line["legendgroup"], line["showlegend"]) for line in drawn] == [
        ("A", True), ("B", True), ("A", False), ("B", False)
    ]  # fmt: skip


def test_a_band_lies_between_its_bounds() -> None:
    band = ([(0, 1.0), (10, 1.0)], [(0, 3.0), (10, 4.0)])
    lower, upper, line = _drawn(line_figure("t", {"": [Series("s", "a", [(0, 2.0), (10, 2.0)])]}, band=band)).data
    assert (lower["y"], upper["y"], line["y"]) == ([1, 1], [3, 4], [2, 2])
    assert upper["fill"] == "tonexty"
    assert [trace.get("showlegend", True) for trace in (lower, upper)] == [False, True]


def test_a_logarithmic_axis_marks_the_few_values_there_are() -> None:
    def axis(values: range) -> Any:
        pairs = [(2.0**k, 1.0) for k in values]
        ends = (pairs[0][0], pairs[-1][0])
        return _drawn(line_figure("t", {"": [Series("s", "a", pairs)]}, x_range=ends, log_x=True)).layout["xaxis"]

    few = axis(range(4, 9))
    assert few["tickvals"] == [16, 32, 64, 128, 256]
    assert few["ticktext"] == ["16", "32", "64", "128", "256"]
    assert few["range"][0] < 4 * math.log10(2)
    assert few["range"][1] > 8 * math.log10(2), "the outer marks are on it"
    assert "tickvals" not in axis(range(4, 24))


def test_one_value_is_a_dot_and_no_value_is_no_figure() -> None:
    (dot,) = _drawn(line_figure("t", {"": [Series("s", "a", [(5, 1.0)]), Series("none", "b", [])]})).data
    assert dot["mode"] == "markers"
    assert line_figure("t", {"": [Series("none", "b", [])]}) is None


def test_what_is_no_number_is_a_gap() -> None:
    (line,) = _drawn(line_figure("t", {"": [Series("s", "a", [(0, 1.0), (1, math.nan), (2, math.inf)])]})).data
    assert line["y"] == [1.0, None, None]


def test_neighbors_share_their_axis_of_values() -> None:
    figures = [line_figure("t", {"": [Series("s", "a", [(0, 1.0), (1, top)])]}) for top in (2.0, 8.0)]
    share_values([*figures, None])
    assert [_drawn(figure).layout["yaxis"]["range"] for figure in figures] == [[0, pytest.approx(8.4)]] * 2
    logs = [line_figure("t", {"": [Series("s", "a", [(0, 0.0), (1, top)])]}, log_y=True) for top in (1e-3, 10.0)]
    share_values(logs)
    low, high = _drawn(logs[0]).layout["yaxis"]["range"]
    assert (low, high) == tuple(_drawn(logs[1]).layout["yaxis"]["range"])
    assert low < -3 < 1 < high, "powers of ten"


def test_thinning_keeps_a_spike_of_one_step() -> None:
    pairs = [(float(x), 1.0) for x in range(10_000)]
    pairs[7_777] = (7_777.0, 99.0)
    thinned = thin(pairs, 100)
    assert len(thinned) <= 100
    assert (7_777.0, 99.0) in thinned
    assert thinned == sorted(thinned)


def test_a_heat_map_marks_the_collapse_where_it_was_and_begins_with_that_layer() -> None:
    figure = _utilization(rescued_run())
    heat, collapse = figure.data
    assert figure.layout["yaxis"]["range"] == [1.5, -0.5], "the first row is on top, and the rows fill the figure"
    assert figure.rows == (LAYERS[1], LAYERS[0])
    assert heat["y"] == ["1.mixer", "0.mixer"]
    assert heat["x"] == list(range(0, 1000, 100))
    assert heat["z"][0] == [0.6] * 4 + [0.1] * 3 + [0.6] * 3
    assert (collapse["name"], collapse["x"], collapse["y"]) == (
        "collapsed", [350, 650, None], ["1.mixer", "1.mixer", None]
    )  # fmt: skip
    assert figure.orders == {"what needs attention": ["1.mixer", "0.mixer"], "the model": ["0.mixer", "1.mixer"]}
    assert f"{LAYERS[1]}: 60 % at first, 60 % at the end, lowest 10 %, highest 60 %" in figure.summary


def test_a_heat_map_has_a_hole_where_nothing_was_measured() -> None:
    bad = (reading(LAYERS[0], 200, status="failed", utilization_ratio=None),)
    measurements = [
        measurement(step, readings=bad) if step == 200 else measurement(step) for step in range(0, 500, 100)
    ]
    assert _utilization(measurements).data[0]["z"][0] == [0.25, 0.25, None, 0.25, 0.25]


def test_a_heat_map_of_a_long_run_has_a_bounded_number_of_columns_each_a_mean() -> None:
    count = 10 * COLUMNS
    measurements = [measurement(step, readings=(reading(LAYERS[0], step, (step % 10) / 10),)) for step in range(count)]
    heat = _utilization(measurements).data[0]
    assert len(heat["x"]) == len(heat["z"][0]) == COLUMNS
    assert set(heat["z"][0]) == {0.45}


def test_a_single_measurement_is_a_heat_map_and_none_is_none() -> None:
    assert _utilization([measurement(7)]).data[0]["x"] == [7]
    assert heat_figure("t", [7], [HeatRow("a", [None])]) is None
    assert heat_figure("t", [], [HeatRow("a", [])]) is None


def test_a_scale_is_dark_at_zero_as_everywhere() -> None:
    scale = _utilization(rescued_run()).data[0]["colorscale"]
    assert [place for place, _ in scale] == [0, 0.25, 0.5, 0.75, 1]
    assert tuple(color for _, color in scale) == COLOR_SCALE
    assert [_luminance(color) for color in COLOR_SCALE] == sorted(_luminance(color) for color in COLOR_SCALE)


def test_labels_are_short_and_each_is_there_once() -> None:
    names = [f"model.{'x' * 30}.{end}.{'y' * 40}" for end in ("a", "b", "a.b")]
    labels = short_names(names)
    assert len(set(labels)) == 3
    assert max(map(len, labels)) <= 22
    assert short_names(["", "a"]) == ["root", "a"]
    assert short_names(["a.mixer", "a.mixer.inner"]) == ["mixer", "mixer.inner"]


def test_events_are_lines_at_their_steps_that_know_their_entries() -> None:
    found = (finding(LAYERS[0], 100, "saturated"), finding(LAYERS[1], 101), finding(LAYERS[1], 900, "healthy"))
    history = _history([measurement(0), measurement(1000, findings=found)])
    rows = event_rows(history)
    figure = _drawn(line_figure("t", {"": [RISING]}, marks=marks(rows)))
    events = {trace["name"]: trace for trace in figure.data[1:]}
    assert {name: (trace["x"][0], trace["customdata"][0]) for name, trace in events.items()} == {
        "saturated": (100, "event-1"),
        "collapsed": (101, "event-2"),
        "healthy": (900, "event-3"),
    }
    assert events["collapsed"]["text"][0] == f"step 101, {LAYERS[1]}: healthy → collapsed: seen so"
    assert figure.layout["yaxis2"]["overlaying"] == "y"
    assert [mark.step for mark in marks(rows, LAYERS[1])] == [101, 900]


def _luminance(color: str) -> float:
    channels = [int(color[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("ground", ["#ffffff", "#1b1e24"], ids=["light", "dark"])
def test_lines_have_the_contrast_that_wcag_asks_of_graphics(ground: str) -> None:
    for color in {style["color"] for style in STYLES.values()} | {*map(condition_color, ("action", *CONDITIONS))}:
        low, high = sorted((_luminance(color), _luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 3.0, color


def every_kind() -> list[Figure]:
    """A figure with everything that figures use, with the worst names."""
    event = Mark(3, "collapsed", "event-1", HOSTILE[0])
    done = Mark(4, "action", "event-2", HOSTILE[1])
    kinds = [Series(name, kind, [(1, 1.0), (2, 3.0)]) for name, kind in zip(HOSTILE, STYLES, strict=False)]
    band = ([(1, 1.0), (2, 1.0)], [(1, 2.0), (2, 2.0)])
    panels = dict.fromkeys(HOSTILE[:2], kinds)
    rows = [HeatRow(name, [0.5, None], ["collapsed", None]) for name in HOSTILE]
    lines = line_figure(HOSTILE[0], panels, log_x=True, log_y=True, x_range=(1.0, 2.0), band=band, marks=(event, done))
    return [_drawn(lines), _drawn(heat_figure(HOSTILE[1], [1, 2], rows, {"the model": HOSTILE}))]


def test_plotly_knows_every_word_of_a_figure() -> None:
    graph_objects: Any = pytest.importorskip("plotly.graph_objects")
    for figure in every_kind():
        made = figure.to_plotly()  # Plotly refuses what it does not know
        assert isinstance(made, graph_objects.Figure)
        assert [trace.type for trace in made.data] == [trace["type"] for trace in figure.data]
        margin = made.layout.margin
        assert made.layout.height - margin.t - margin.b == figure.layout["height"] - 26 - 38, "as large as on a page"
        assert margin.t >= 40, "a title has room"
