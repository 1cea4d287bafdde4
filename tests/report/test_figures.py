"""Where things lie on a chart."""

from __future__ import annotations

from pathlib import Path

import pytest

from ess_monitor.report import RunHistory
from ess_monitor.report.components import event_rows, markers, steps_of
from ess_monitor.report.figures import Scale, Series, line_chart, thin, value_scale
from ess_monitor.report.sections.utilization import CELLS_OF_A_ROW, heat_map
from tests.report.helpers import LAYERS, finding, measurement, reading, rescued_run, run_info


def _points(text: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (point.split(",") for point in text.split())]


def test_a_line_runs_from_lower_left_to_upper_right_when_it_rises() -> None:
    chart = line_chart("t", [Series("s", "a", [(0, 0.0), (50, 1.0), (100, 2.0)])], Scale(0, 100), y=Scale(0, 2))
    assert chart is not None
    assert _points(chart.lines[0].points) == [(0, 1000), (500, 500), (1000, 0)]
    assert (chart.x_ticks[0].at, chart.x_ticks[0].label) == (0, "0")
    assert (chart.y_ticks[-1].at, chart.y_ticks[-1].label) == (0, "2")
    assert chart.summary == "s: 0 at step 0, 2 at step 100, lowest 0, highest 2"


def test_a_band_goes_out_along_the_lower_bound_and_back_along_the_upper() -> None:
    band = ([(0, 1.0), (10, 1.0)], [(0, 3.0), (10, 4.0)])
    chart = line_chart("t", [Series("s", "a", [(0, 2.0), (10, 2.0)])], Scale(0, 10), y=Scale(0, 4), band=band)
    assert chart is not None
    assert _points(chart.band) == [(0, 750), (1000, 750), (1000, 0), (0, 250)]


def test_one_value_is_a_dot_and_no_value_is_no_chart() -> None:
    chart = line_chart("t", [Series("s", "a", [(5, 1.0)]), Series("none", "b", [])], Scale(0, 10), y=Scale(0, 2))
    assert chart is not None
    assert [line.dot for line in chart.lines] == [(50, 50)]
    assert line_chart("t", [Series("none", "b", [])], Scale(0, 10)) is None


@pytest.mark.parametrize("values", [[0.0], [5.0], [-3.0, -3.0], [1e-12, 2e-12], [1e9, 1e9 + 1], [], [-2.0, 7.0]])
@pytest.mark.parametrize("zero", [True, False])
def test_every_value_lies_inside_its_scale_which_has_ticks(values: list[float], zero: bool) -> None:
    scale = value_scale(values, zero=zero)
    assert scale.low < scale.high
    assert all(scale.low <= value <= scale.high for value in values)
    assert len(scale.ticks()) >= 2
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks())


def test_thinning_keeps_a_spike_of_one_step() -> None:
    pairs = [(float(x), 1.0) for x in range(10_000)]
    pairs[7_777] = (7_777.0, 99.0)
    thinned = thin(pairs, 100)
    assert len(thinned) <= 100
    assert (7_777.0, 99.0) in thinned
    assert thinned == sorted(thinned)


def _history(measurements: list) -> RunHistory:  # type: ignore[type-arg]
    return RunHistory(
        Path("log"),
        run_info(),
        tuple(measurements),
        tuple(found for each in measurements for found in each.findings),
        tuple(done for each in measurements for done in each.actions),
    )


def test_a_heat_row_covers_the_axis_and_marks_the_collapse_where_it_was() -> None:
    history = _history(rescued_run())
    heat = heat_map(history, "utilization_ratio", steps_of(history))
    assert heat is not None
    row = heat.rows[1]
    assert [cell.kind for cell in row.cells] == ["6", "1", "6"]
    assert row.cells[0].start == 0
    assert sum(cell.width for cell in row.cells) == pytest.approx(1000, abs=0.5)
    (collapse,) = row.conditions
    assert (collapse.start, collapse.start + collapse.width) == pytest.approx(
        (1000 * 350 / 900, 1000 * 650 / 900), abs=0.2
    )
    assert heat.rows[0].conditions == ()
    assert row.text == "60 % at first, 60 % at the end, lowest 10 %, highest 60 %"


def test_a_heat_row_has_a_hole_where_nothing_was_measured() -> None:
    bad = (reading(LAYERS[0], 200, status="failed", utilization_ratio=None),)
    measurements = [
        measurement(step, readings=bad) if step == 200 else measurement(step) for step in range(0, 500, 100)
    ]
    history = _history(measurements)
    heat = heat_map(history, "utilization_ratio", steps_of(history))
    assert heat is not None
    first, second = heat.rows[0].cells
    assert (first.start + first.width, second.start) == (375, 625)


def test_a_heat_row_of_a_long_run_has_a_bounded_number_of_cells() -> None:
    measurements = [
        measurement(step, readings=(reading(LAYERS[0], step, (step % 7) / 7),)) for step in range(10 * CELLS_OF_A_ROW)
    ]
    history = _history(measurements)
    heat = heat_map(history, "utilization_ratio", steps_of(history))
    assert heat is not None
    assert 1 <= len(heat.rows[0].cells) <= CELLS_OF_A_ROW


def test_a_single_measurement_fills_its_row() -> None:
    history = _history([measurement(7)])
    heat = heat_map(history, "utilization_ratio", steps_of(history))
    assert heat is not None
    assert [(cell.start, cell.width) for cell in heat.rows[0].cells] == [(0, 1000)]


def test_events_close_to_each_other_share_a_mark_in_the_color_of_the_worst() -> None:
    found = (finding(LAYERS[0], 100, "saturated"), finding(LAYERS[1], 101), finding(LAYERS[1], 900, "healthy"))
    history = _history([measurement(0), measurement(1000, findings=found)])
    marks = markers(event_rows(history), Scale(0, 1000))
    assert [(mark.label, mark.kind, mark.at, mark.target) for mark in marks] == [
        ("1–2", "collapsed", 10, "event-1"),
        ("3", "healthy", 90, "event-3"),
    ]
    assert LAYERS[0] in marks[0].text
    assert LAYERS[1] in marks[0].text
