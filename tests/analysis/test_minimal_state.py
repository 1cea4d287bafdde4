"""The smallest states of a model's layers, against the SVD of every H_i of the captured operators."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from ess_monitor import CaptureConfig, CaptureError, MonitorConfig, NoLayersError, capture_operators
from ess_monitor.analysis import LayerMinimalState, minimal_state
from ess_monitor.analysis.smallest_states import tried_sizes
from ess_monitor.errors import ConfigError, EssMonitorError
from ess_monitor.ess import realize
from ess_monitor.report import render_minimal_state
from tests.analysis.models import inputs, mixed, of_transformers, tokens
from tests.report.helpers import unwanted_scripts


def _by_hand(T: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Singular values of every H_i, and ||T||_F^2 over all operators."""
    blocks = [torch.linalg.svdvals(T[:, :, i:, :i]) for i in range(1, T.shape[-1])]
    return blocks, T.square().sum()


@pytest.mark.parametrize("layer", ["gla", "attention"])
def test_ranks_floors_and_errors_are_those_of_the_operators(layer: str) -> None:
    model, u = mixed(), inputs()
    operator = capture_operators(model, u)[layer]
    T = operator.materialize()
    values, total = _by_hand(T)
    found = next(each for each in minimal_state(model, u).layers if each.layer == layer)
    ranks = torch.stack([(each > 1e-13 * each[..., :1]).sum(-1) for each in values], dim=-1)
    assert (found.status, found.operators, found.length) == ("ok", 4, 24)
    assert found.rank == int(ranks.max())
    assert found.mean_rank == pytest.approx(float(ranks.double().mean()))
    assert (found.state_capacity, found.causal_rank) == ((12.0, 23) if layer == "attention" else (4.0, 4))
    assert [each.size for each in found.errors] == list(tried_sizes(12 if layer == "attention" else 4))
    for each in found.errors:
        tails = torch.stack([one[..., each.size :].square().sum(-1) for one in values], dim=-1)
        assert each.floor == pytest.approx(float((tails.amax(-1).sum() / total).sqrt()), rel=1e-6, abs=1e-9)
        truncated = realize(operator, size=each.size).materialize()
        assert each.error == pytest.approx(float(((truncated - T).square().sum() / total).sqrt()), rel=1e-5, abs=1e-7)
        assert each.floor <= each.error + 1e-7


def test_the_smallest_state_for_an_error_is_the_first_that_makes_no_more() -> None:
    result = minimal_state(mixed(), inputs(), relative_errors=(0.5, 0.1, 1.0))
    for layer in result.layers:
        for state in layer.states:
            assert state.size is not None
            errors = {each.size: each for each in layer.errors}
            assert errors[state.size].error <= state.relative_error
            smaller = [each for size, each in errors.items() if size < state.size]
            assert all(each.error > state.relative_error for each in smaller)
            assert state.at_least <= state.size
            assert all(each.floor > state.relative_error for each in smaller if each.size < state.at_least)
        assert layer.states[2].size == 0


def test_a_layer_without_a_result_says_why_and_the_others_have_theirs() -> None:
    result = minimal_state(mixed(), inputs(length=1))
    assert {layer.status for layer in result.layers} == {"too_short"}
    assert [info.name for info in result.skipped] == ["lstm"]
    broken = inputs()
    broken[0, 5] = math.nan
    assert {layer.status for layer in minimal_state(mixed(), broken).layers} == {"nonfinite"}
    linearized = MonitorConfig(capture=CaptureConfig(unknown="jacobian"))
    lstm = minimal_state(mixed(), inputs(), config=linearized).layers[2]
    assert (lstm.layer, lstm.status) == ("lstm", "skipped")
    assert "linearized" in lstm.message
    with pytest.raises(NoLayersError, match="no sequence mixer"):
        minimal_state(torch.nn.Linear(16, 16).double(), inputs())


def test_layers_without_a_recurrence_are_analyzed_on_their_first_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ess_monitor.analysis.layer_operators.TOKENS_WITHOUT_RECURRENCE", 8)
    gla, attention = minimal_state(mixed(), inputs()).layers
    assert (gla.length, gla.message) == (24, "")
    assert (attention.length, attention.message) == (8, "of its first 8 tokens")
    assert attention.rank == 4


def test_many_operators_are_analyzed_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = minimal_state(mixed(), inputs())
    monkeypatch.setattr("ess_monitor.analysis.layer_operators._GROUP_ELEMENTS", 1)
    for some, all_of_it in zip(minimal_state(mixed(), inputs()).layers, whole.layers, strict=True):
        assert (some.rank, some.causal_rank, some.operators) == (all_of_it.rank, all_of_it.causal_rank, 4)
        assert [each.error for each in some.errors] == pytest.approx([each.error for each in all_of_it.errors])


def test_a_strict_analysis_raises_what_a_layer_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("ess_monitor.analysis.layer_operators.realize", broken)
    assert [layer.message for layer in minimal_state(mixed(), inputs()).layers] == ["RuntimeError: no memory"] * 2
    with pytest.raises(CaptureError, match=r"could not analyze gla: RuntimeError: no memory"):
        minimal_state(mixed(), inputs(), config=MonitorConfig(strict=True))


@pytest.mark.parametrize(("name", "sizes"), [("mamba2", [8.0, 8.0]), ("llama", [12.0, 12.0]), ("bamba", [8.0, 12.0])])
def test_real_models_are_analyzed(name: str, sizes: list[float]) -> None:
    seen: list[str] = []

    def progress(layers: object) -> object:
        for layer in layers:  # type: ignore[attr-defined]
            seen.append(layer.layer.name)
            yield layer

    result = minimal_state(of_transformers(name), tokens(), progress=progress)  # type: ignore[arg-type]
    assert [layer.state_capacity for layer in result.layers] == sizes
    assert [layer.layer for layer in result.layers] == seen
    for layer in result.layers:
        assert layer.status == "ok", layer.message
        assert layer.rank is not None
        assert 1 <= layer.rank <= 12
        assert layer.errors[-1].error == pytest.approx(0, abs=1e-5)


def test_rows_make_a_data_frame_with_a_row_for_each_layer_and_error() -> None:
    pandas = pytest.importorskip("pandas")
    result = minimal_state(mixed(), inputs())
    frame = result.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert list(zip(frame["layer"], frame["relative_error"], strict=True)) == [
        (layer, error) for layer in ("gla", "attention") for error in (0.1, 0.01)
    ]
    assert list(frame["rank"]) == [4, 4, 12, 12]
    failed = LayerMinimalState(layer="x", status="failed", message="why")
    rows = result.model_copy(update={"layers": (failed,)}).rows()
    assert [row["message"] for row in rows] == ["why"]
    assert rows[0].keys() == result.rows()[0].keys()


def test_without_pandas_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match=r'pip install "ess-monitor\[pandas\]"'):
        minimal_state(mixed(), inputs()).to_dataframe()


def test_sizes_are_tried_closely_where_they_are_small() -> None:
    assert tried_sizes(0) == (0,)
    assert tried_sizes(5) == (0, 1, 2, 3, 4, 5)
    assert tried_sizes(33) == (*range(9), 10, 12, 14, 16, 20, 24, 28, 32, 33)


@pytest.mark.parametrize("errors", [[0.0], [1.1], ["1"], 0.1])
def test_relative_errors_out_of_range_are_refused(errors: object) -> None:
    with pytest.raises(EssMonitorError, match="relative_errors"):
        minimal_state(mixed(), inputs(), relative_errors=errors)  # type: ignore[arg-type]


def test_the_page_shows_every_layer_and_escapes_its_name() -> None:
    result = minimal_state(mixed(), inputs())
    hostile = LayerMinimalState(layer="<script>", status="failed", message="<b>why</b>")
    page = render_minimal_state(result.model_copy(update={"layers": (*result.layers, hostile)}))
    assert unwanted_scripts(page) == []
    assert "&lt;b&gt;why" in page
    assert page.count("<figure") == 2
    for text in ("gla", "attention", "lstm", "floor of any recurrence", "for 10 % error", "Written by ess-monitor."):
        assert text in page
    assert "optimizer steps" not in page
