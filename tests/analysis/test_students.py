"""Students that are trained for a trial, against losses that are computed here, from T and the layer's outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ess_monitor import CaptureConfig, MonitorConfig, capture_operators
from ess_monitor.analysis import Compressibility, StudentTraining, compressibility, reduce
from ess_monitor.errors import ConfigError
from ess_monitor.featurizers import build_mixer
from ess_monitor.report import render_compressibility
from tests.analysis.models import WIDTH, inputs, mixed, of_transformers, tokens

STATE = 4
UNTRAINED = StudentTraining(operator_steps=0, activation_steps=0)
SHORT = StudentTraining(operator_steps=8, activation_steps=8)


def teacher(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_mixer(name, WIDTH, 2, STATE).double()


def share(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())


def tried(model: nn.Module, *given: Any, **settings: Any) -> tuple[Compressibility, dict[tuple[str, int], nn.Module]]:
    students: dict[tuple[str, int], nn.Module] = {}

    def take(layer: str, size: int, student: nn.Module) -> None:
        students[layer, size] = student

    return compressibility(model, *given, on_student=take, **settings), students


@pytest.mark.parametrize("name", ["gla", "wla", "gla_s6", "s6"])
def test_losses_are_those_of_the_student_in_the_place_of_its_teacher(name: str) -> None:
    model, u = teacher(name), inputs()
    T = next(iter(capture_operators(model, u).values())).materialize()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = MonitorConfig(capture=CaptureConfig(heads=None))
    for trial in (SHORT.model_copy(update={"activation_steps": 0}), SHORT):
        result, students = tried(model, u, student_states=[2], trial=trial, config=config)
        [loss], student = result.layers[0].students, students["model", 2]
        fresh = build_mixer(name, WIDTH, 2, 2).double()
        fresh.load_state_dict(student.state_dict())
        with torch.no_grad():
            assert loss.activation_loss == pytest.approx(share(fresh(u), model(u)), rel=1e-6)
        if trial.activation_steps == 0:  # the student as the first step left it
            small = next(iter(capture_operators(fresh, u).values())).materialize()
            assert loss.operator_loss == pytest.approx(share(small, T), rel=1e-6)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training


def test_a_student_begins_with_what_reduce_keeps_and_each_step_lowers_its_loss() -> None:
    model, u = teacher("gla"), inputs()
    [start] = compressibility(model, u, student_states=[2], trial=UNTRAINED).layers
    smaller, reduced = reduce(model, u, state=2)
    assert start.students[0].operator_loss == pytest.approx(reduced.layers[0].operator_loss, rel=1e-6)
    with torch.no_grad():
        assert start.students[0].activation_loss == pytest.approx(share(smaller(u), model(u)), rel=1e-6)
    [trained] = compressibility(model, u, student_states=[2], trial=StudentTraining()).layers
    for name in ("operator_loss", "activation_loss"):
        assert getattr(trained.students[0], name) < 0.8 * getattr(start.students[0], name)
    assert trained.students[0].floor <= trained.students[0].operator_loss


def test_a_student_with_the_state_of_its_teacher_loses_nothing_and_none_has_no_state() -> None:
    result, students = tried(teacher("gla"), inputs(), student_states=[0, 4, 9], trial=SHORT)
    losses = [(each.operator_loss, each.activation_loss) for each in result.layers[0].students]
    assert losses == [(None, None), (0, 0), (0, 0)]
    assert set(students) == {("model", 4), ("model", 9)}


def test_operators_are_those_of_the_heads_and_tokens_that_are_measured_and_outputs_of_all() -> None:
    model, u = teacher("s6"), inputs(batch=5)
    config = MonitorConfig(capture=CaptureConfig(samples=2, heads=3, max_length=12))
    result, students = tried(
        model, u, student_states=[2], config=config, trial=StudentTraining(operator_steps=6, activation_steps=0)
    )
    T, small = (next(iter(capture_operators(each, u).values())).materialize() for each in (model, students["model", 2]))
    few, wanted = (each[[0, 2]][:, [0, 5, 10], :12, :12] for each in (small, T))  # evenly spaced
    [loss] = result.layers[0].students
    assert loss.operator_loss == pytest.approx(share(few, wanted), rel=1e-6)
    with torch.no_grad():
        assert loss.activation_loss == pytest.approx(share(students["model", 2](u), model(u)), rel=1e-6)


@pytest.mark.parametrize("name", ["mamba2", "bamba"])
def test_layers_of_real_models_have_students_and_attention_says_why_not(name: str) -> None:
    model = of_transformers(name)
    few = StudentTraining(operator_steps=3, activation_steps=3, learning_rate=1e-3)
    result = compressibility(model, tokens(), student_states=[4], trial=few)
    start = compressibility(model, tokens(), student_states=[4], trial=UNTRAINED)
    for layer, first in zip(result.layers, start.layers, strict=True):
        [loss], [begun] = layer.students, first.students
        if layer.operator == "SoftmaxAttention":
            assert loss.operator_loss is None
            assert "no student was trained: attention keeps every token" in layer.message
        else:
            assert layer.message == ""
            assert loss.floor <= loss.operator_loss < begun.operator_loss  # type: ignore[operator]


class Forgetful(nn.Module):
    """A layer whose input does not say what it does: it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = build_mixer("gla", WIDTH, 2, STATE)
        self.mixer.register_forward_pre_hook(self._changed)
        self.calls = 0

    def _changed(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        self.calls += 1
        return (args[0] * (-1) ** self.calls + self.calls,)

    def forward(self, u: Tensor) -> Any:
        return self.mixer(u)


def test_what_cannot_be_called_again_has_no_student_and_says_so() -> None:
    [layer] = compressibility(Forgetful(), inputs().float(), student_states=[2], trial=SHORT).layers
    assert layer.status == "ok"
    assert "called again by itself, it does something else" in layer.message
    assert layer.students[0].operator_loss is None
    broken = teacher("gla")
    with torch.no_grad():
        broken.readout.out.weight[0, 0] = torch.nan  # type: ignore[union-attr]
    [layer] = compressibility(broken, inputs(), student_states=[2], trial=SHORT).layers
    assert layer.students[0].activation_loss is None
    assert "no student was trained" in layer.message


def test_half_precision_is_trained_in_float32_and_gradients_may_be_off_outside() -> None:
    model = teacher("gla").bfloat16().requires_grad_(False)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            result, students = tried(model, inputs().bfloat16(), student_states=[2], trial=SHORT)
        assert 0 < result.layers[0].students[0].activation_loss < 1  # type: ignore[operator]
        assert next(students["model", 2].parameters()).dtype == torch.float32
    assert next(model.parameters()).grad is None


def test_rows_and_page_hold_the_losses_of_students() -> None:
    result = compressibility(mixed(), inputs(), student_states=[2], trial=SHORT)
    gla, attention = result.rows()
    assert 0 < gla["activation_loss"] < 1
    assert attention["activation_loss"] is None
    assert Compressibility.model_validate(result.model_dump(mode="json")) == result
    page = render_compressibility(result)
    assert "trained student" in page
    assert "after 8 steps on the operator" in page
    assert "attention: no student was trained" in page
    assert f"→ {100 * gla['operator_loss']:.2g} %, {100 * gla['activation_loss']:.2g} %" in page
    assert "trained student" not in render_compressibility(compressibility(mixed(), inputs(), student_states=[2]))


def test_mistakes_in_a_trial_are_refused() -> None:
    model, u = teacher("gla"), inputs()
    with pytest.raises(ConfigError, match="operator_steps: must be greater than or equal to 0"):
        StudentTraining(operator_steps=-1)
    with pytest.raises(ConfigError, match="trial"):
        compressibility(model, u, trial=50)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give a trial"):
        compressibility(model, u, on_student=print)
    with pytest.raises(ConfigError, match="on_student"):
        compressibility(model, u, trial=SHORT, on_student=3)  # type: ignore[arg-type]
