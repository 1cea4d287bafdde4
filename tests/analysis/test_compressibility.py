"""The operator loss that no student can avoid, against the SVD of every H_i of the captured operators."""

from __future__ import annotations

import pytest
import torch

from ess_monitor import capture_operators
from ess_monitor.analysis import LayerCompressibility, compressibility
from ess_monitor.errors import EssMonitorError
from ess_monitor.ess import DiagonalRecurrence, realize
from ess_monitor.report import render_compressibility
from tests.analysis.models import inputs, mixed, of_transformers, tokens
from tests.report.helpers import unwanted_scripts

STATES = (1, 2, 3)


def test_floors_and_truncations_are_those_of_the_operators() -> None:
    model, u = mixed(), inputs()
    operators = capture_operators(model, u)
    result = compressibility(model, u, student_states=(3, 1, 2, 2))
    assert result.student_states == STATES
    for layer in result.layers:
        T = operators[layer.layer].materialize()
        squares = [torch.linalg.svdvals(T[:, :, i:, :i]).square() for i in range(1, T.shape[-1])]
        total = T.square().sum()
        assert [each.state_size for each in layer.students] == list(STATES)
        for each in layer.students:
            tails = torch.stack([one[..., each.state_size :].sum(-1) for one in squares], dim=-1).amax(-1)
            assert each.floor == pytest.approx(float(tails.sum() / total), rel=1e-6)
            truncated = realize(operators[layer.layer], size=each.state_size).materialize()
            assert each.truncation == pytest.approx(float((truncated - T).square().sum() / total), rel=1e-5)


def test_no_student_that_is_trained_gets_below_the_floor() -> None:
    model, u = mixed(), inputs(length=12, batch=1)
    teacher = capture_operators(model, u)["gla"].materialize()
    floor = compressibility(model, u, student_states=[1]).layers[0].students[0].floor
    students = [torch.randn(1, 2, 12, 1).double().requires_grad_() for _ in range(3)]
    optimizer = torch.optim.Adam(students, lr=0.05)
    for _ in range(60):
        decay, b, c = students
        # T of a recurrence with one state dimension, in a form that can be differentiated.
        logs = -torch.nn.functional.softplus(decay[..., 0]).cumsum(2)
        T = ((logs[..., :, None] - logs[..., None, :]).exp() * c * b[..., None, :, 0]).tril()
        loss = (T - teacher).square().sum() / teacher.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    step = -torch.nn.functional.softplus(students[0].detach())
    exact = DiagonalRecurrence(step, students[1].detach(), students[2].detach()).materialize()
    torch.testing.assert_close(exact, T.detach(), atol=0.2, rtol=0.2)  # one step apart
    assert floor <= loss.item() < 1


@pytest.mark.parametrize("name", ["mamba2", "llama", "bamba"])
def test_real_models_are_analyzed(name: str) -> None:
    result = compressibility(of_transformers(name), tokens(), student_states=[2, 12])
    assert [layer.status for layer in result.layers] == ["ok", "ok"]
    for layer in result.layers:
        small, full = layer.students
        assert 0 < small.floor <= small.truncation < 1
        assert full.floor == pytest.approx(0, abs=1e-9)
        assert full.truncation == pytest.approx(0, abs=1e-9)


def test_rows_and_page_show_every_layer_with_or_without_a_result() -> None:
    result = compressibility(mixed(), inputs(), student_states=STATES)
    failed = LayerCompressibility(layer="<script>", status="failed", message="<b>why</b>")
    result = result.model_copy(update={"layers": (*result.layers, failed)})
    rows = result.rows()
    assert [(row["layer"], row["state_size"]) for row in rows] == [
        *((layer, state) for layer in ("gla", "attention") for state in STATES),
        ("<script>", None),
    ]
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    page = render_compressibility(result)
    assert page.count("<figure") == 2
    assert unwanted_scripts(page) == []
    for text in ("&lt;b&gt;why", "lstm", "state 3", "floor of any student"):
        assert text in page


@pytest.mark.parametrize("states", [[], [-1], [1.5], "4", 4, None])
def test_states_that_are_no_sizes_are_refused(states: object) -> None:
    with pytest.raises(EssMonitorError, match="student_states"):
        compressibility(mixed(), inputs(), student_states=states)  # type: ignore[arg-type]
