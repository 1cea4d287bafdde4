"""Figures of the results of analyses: plotly's own, with the numbers of the records, as on their pages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ess_monitor
from ess_monitor import ConfigError, figures_of, profile
from ess_monitor.analysis import (
    StudyRun,
    compressibility,
    correlate,
    hybrid_advice,
    length_profile,
    minimal_state,
    state_modulation,
)
from ess_monitor.analysis import reduce as make_smaller
from ess_monitor.report import (
    render_compressibility,
    render_hybrid_advice,
    render_length_profile,
    render_minimal_state,
    render_reduction,
    render_state_modulation,
    render_study,
)
from tests.analysis.models import inputs, mixed
from tests.pipeline.test_modulation import Model, text
from tests.report.helpers import figures_of as figures_of_page

graph_objects = pytest.importorskip("plotly.graph_objects")


def study() -> Any:
    runs = [
        StudyRun(
            name=f"run {k}", task="mqar", state_capacity=size, effective_size=size / 2, demand=demand, metric=k / 8
        )
        for k, (size, demand) in enumerate((size, demand) for size in (4.0, 8.0) for demand in (2.0, 4.0))
    ]
    return correlate(runs, metric="accuracy", demand="kv_pairs", resamples=10)


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], str], int]] = {
    "minimal_state": (lambda: minimal_state(mixed(), inputs()), render_minimal_state, 2),
    "compressibility": (lambda: compressibility(mixed(), inputs(), student_states=[1, 2]), render_compressibility, 2),
    "reduce": (lambda: make_smaller(mixed(), inputs(), state=2)[1], render_reduction, 1),
    "hybrid_advice": (lambda: hybrid_advice(mixed(), inputs()), render_hybrid_advice, 1),
    "length_profile": (lambda: length_profile(mixed(), inputs(), lengths=[8, 24]), render_length_profile, 3),
    "state_modulation": (
        lambda: state_modulation(Model(), text(), separators=[0, 5], tolerances=[0.1]), render_state_modulation, 2
    ),
    "study": (study, render_study, 2),
}  # fmt: skip
"""What makes a result, what renders its page, and how many figures it has."""


@pytest.mark.parametrize("name", CASES)
def test_a_result_has_the_figures_of_its_page(name: str) -> None:
    make, render, count = CASES[name]
    result = make()
    figures, on_page = figures_of(result), figures_of_page(render(result))
    assert len(figures) == len(on_page) == count
    assert [each["data"] for each in on_page] == [each["data"] for each in map(_given, figures)]
    titles = [figure.layout.title.text for figure in figures]
    assert len({*titles}) == count, "each says what it shows"
    for figure in figures:
        assert figure.layout.xaxis.title.text
        assert isinstance(figure, graph_objects.Figure)


def _given(figure: Any) -> Any:
    return {"data": [{key: _listed(value) for key, value in trace.items()} for trace in figure.to_dict()["data"]]}


def _listed(value: Any) -> Any:
    return [_listed(each) for each in value] if isinstance(value, (list, tuple)) else value


def test_errors_over_the_state_are_those_of_the_record() -> None:
    result = minimal_state(mixed(), inputs())
    first, _ = figures_of(result)
    assert first.layout.title.text == "gla"
    assert (first.layout.xaxis.title.text, first.layout.yaxis.title.text) == ("state size", "relative error")
    known = [each for each in result.layers[0].errors if each.error is not None and each.error > 1e-7]
    reached = next(line for line in first.data if line.name == "truncated realization")
    assert list(reached.x) == [each.size for each in known]
    assert list(reached.y) == pytest.approx([each.error for each in known], rel=1e-3)


def test_a_profile_is_drawn_over_the_depth_and_over_the_positions() -> None:
    result = profile(mixed(), inputs())
    sizes, ratios, *positions = figures_of(result)
    ess = next(line for line in sizes.data if line.name == "ESS")
    assert list(ess.x) == [1, 2]
    assert list(ess.y) == pytest.approx([reading.effective_size for reading in result.readings], rel=1e-3)
    used = next(line for line in ratios.data if line.name == "utilization")
    assert list(used.y) == pytest.approx([reading.utilization_ratio for reading in result.readings], rel=1e-3)
    assert [each.layout.title.text for each in positions] == [
        "gla: ESS over positions",
        "attention: ESS over positions",
    ]
    for figure, reading in zip(positions, result.readings, strict=True):
        assert tuple(figure.data[0].x) == reading.positions
        assert list(figure.data[0].y) == pytest.approx(reading.per_position, rel=1e-3)
        most = next(line for line in figure.data if line.name == "largest possible")
        assert all(y <= min(x, reading.length - x) for x, y in zip(most.x, most.y, strict=True))


def test_a_result_without_a_layer_has_no_figures() -> None:
    result = length_profile(mixed(), inputs(), lengths=[8, 24])
    assert figures_of(result.model_copy(update={"layers": ()})) == []


def test_a_wrong_result_is_told_what_has_figures() -> None:
    for wrong in (make_smaller(mixed(), inputs(), state=2), torch.zeros(2), None):
        with pytest.raises(
            ConfigError, match=r"result: .* has no figures here; give what .* \(of reduce its numbers\)"
        ):
            figures_of(wrong)


def test_without_plotly_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ConfigError, match=r'needs plotly: pip install "ess-monitor\[plotly\]"'):
        ess_monitor.figures_of(study())
