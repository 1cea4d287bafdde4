"""A third remedy is one class and one entry in a tuple: the autopilot and the treatment know none by name."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from ess_monitor.capture import Layer, find_layers
from ess_monitor.errors import CheckpointError, ConfigError
from ess_monitor.interventions import Autopilot, AutopilotConfig, autopilot, treatment
from ess_monitor.interventions.alpha import Optimizers
from ess_monitor.interventions.remedies import REMEDIES, PullToIdentity, RescaleAlpha, choose_remedy
from ess_monitor.interventions.remedy import Remedy, RemedyState
from ess_monitor.records import Action, ActionKind, Condition
from tests.interventions.helpers import backbone
from tests.interventions.pilots import FIRST, LAST, QUICK, Run, said, weights
from tests.interventions.test_autopilot_state import saved_and_loaded

COLLAPSED: dict[str, Condition] = {FIRST: "healthy", LAST: "collapsed"}
HEALTHY: dict[str, Condition] = {FIRST: "healthy", LAST: "healthy"}


class GateBiasState(RemedyState):
    bias: Tensor


class ResetGateBias(Remedy):
    """Sets the bias of a gate to one value, with which every state starts at the same decay."""

    name: ClassVar[Any] = "reset_gate_bias"
    subject = "gate bias"
    ladder = (1.0, 4.0)
    is_permanent = True
    State = GateBiasState

    _before: Tensor | None = None

    @classmethod
    def match(cls, layer: Layer) -> bool:
        return hasattr(layer.module, "gate")

    @classmethod
    def describe(cls, strength: float) -> str:
        return f"bias of the gate set to {strength:g}"

    def apply(self, strength: float, optimizer: Optimizers) -> None:
        if self._before is None:
            self._before = self._bias.clone()
        self._bias.fill_(strength)

    def undo(self, optimizer: Optimizers) -> None:
        assert self._before is not None
        self._bias.copy_(self._before)

    def state_dict(self) -> dict[str, Any]:
        return {"bias": self._before}

    def resume(self, strength: float, state: GateBiasState) -> None:
        self._before = state.bias

    @property
    def _bias(self) -> Tensor:
        bias: Tensor = self.layer.module.get_submodule("gate.up").bias.data  # type: ignore[assignment]
        return bias


class ActionWithGateBias(Action):
    """What one more word in `records.ActionKind` does."""

    action: Literal[ActionKind, "reset_gate_bias"]  # type: ignore[assignment]


class RunWithGateBias(Run):
    def new_pilot(self, **settings: Any) -> Autopilot:
        config = AutopilotConfig.model_validate({**QUICK, **settings})
        layers = find_layers(self.model)
        return Autopilot(config, layers, retention_below=0.7, remedies=(ResetGateBias, *REMEDIES))


@pytest.fixture(autouse=True)
def _the_records_know_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (autopilot, treatment):
        monkeypatch.setattr(module, "Action", ActionWithGateBias)


def test_a_third_remedy_is_applied_escalated_and_rolled_back_bit_for_bit() -> None:
    run = RunWithGateBias("gla")
    run.train(2)
    before, bias = weights(run.model), run.model.blocks[1].mixer.gate.up.bias
    [applied] = run.measure(COLLAPSED)
    assert said((applied,)) == [(LAST, "reset_gate_bias", "applied", 1.0)]
    assert "bias of the gate set to 1" in applied.message
    assert bias.eq(1.0).all()
    assert run.pulled == []
    assert said(run.measure(COLLAPSED, times=2)) == [(LAST, "reset_gate_bias", "applied", 4.0)]
    assert bias.eq(4.0).all()
    assert [treatment.action for treatment in run.pilot.active] == ["reset_gate_bias"]
    [action] = run.measure(COLLAPSED, loss=99.0)
    assert (action.outcome, action.action) == ("rolled_back", "reset_gate_bias")
    assert "reset_gate_bias undone" in action.message
    assert weights(run.model) == before
    assert run.pilot.active == ()


def test_two_remedies_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two of rescale_alpha, pull_to_identity, rescale_alpha have one name"):
        Autopilot(AutopilotConfig(), (), remedies=(*REMEDIES, RescaleAlpha))


def test_a_third_remedy_goes_through_a_checkpoint_and_is_undone_afterwards() -> None:
    run = RunWithGateBias("gla")
    before = weights(run.model)
    run.measure(COLLAPSED)
    state = saved_and_loaded({"model": run.model.state_dict(), "pilot": run.pilot.state_dict()})
    other = RunWithGateBias("gla")
    other.model.load_state_dict(state["model"])
    other.pilot.load_state_dict(state["pilot"])
    other.step = run.step
    assert str(other.pilot.state_dict()) == str(run.pilot.state_dict())
    assert said(other.measure(COLLAPSED, times=2)) == [(LAST, "reset_gate_bias", "applied", 4.0)]
    assert [action.outcome for action in other.measure(COLLAPSED, loss=99.0)] == ["rolled_back"]
    assert weights(other.model) == before


def test_a_third_remedy_stays_after_the_recovery_and_is_given_up_at_the_end_of_its_ladder() -> None:
    recovered, failed = RunWithGateBias("gla"), RunWithGateBias("gla")
    recovered.measure(COLLAPSED)
    assert [action.outcome for action in recovered.measure(HEALTHY)] == ["recovered"]
    assert recovered.measure(HEALTHY, times=3) == ()
    assert recovered.pilot.active == ()
    assert recovered.model.blocks[1].mixer.gate.up.bias.eq(1.0).all()
    failed.measure(COLLAPSED, times=4)
    assert said(failed.measure(COLLAPSED)) == [(LAST, "reset_gate_bias", "failed", 4.0)]


def test_advise_names_it_and_changes_nothing() -> None:
    run = RunWithGateBias("gla", mode="advise")
    before = weights(run.model)
    [action] = run.measure(COLLAPSED)
    assert (action.outcome, action.message) == ("dry_run", "mode auto would apply reset_gate_bias at 1 here")
    assert weights(run.model) == before


def test_a_layer_that_it_does_not_match_gets_the_next_one() -> None:
    assert said(RunWithGateBias("wla").measure(COLLAPSED)) == [(LAST, "pull_to_identity", "applied", 0.5)]


def test_the_state_of_a_remedy_that_is_not_there_is_refused() -> None:
    run, plain = RunWithGateBias("gla"), Run("gla")
    run.measure(COLLAPSED)
    with pytest.raises(CheckpointError, match="a treatment with reset_gate_bias; the remedies here are rescale_alpha"):
        plain.pilot.load_state_dict(run.pilot.state_dict())
    broken = run.pilot.state_dict()
    broken["treatments"][0]["bias"] = "none"
    with pytest.raises(CheckpointError, match=r"the state cannot be read \(treatments.0.bias: "):
        run.pilot.load_state_dict(broken)
    assert len(run.pilot.active) == 1


@pytest.mark.parametrize("wrong", [None, 3, "pull", [None], [int], [PullToIdentity, "pull"]])
def test_what_is_not_a_remedy_is_refused_by_name(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"^remedies "):
        Autopilot(AutopilotConfig(), find_layers(backbone("gla")), remedies=wrong)


# -- the two of the package -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("featurizer", "chosen"),
    [("wla", PullToIdentity), ("gla", PullToIdentity), ("s6", RescaleAlpha), ("gla_s6", RescaleAlpha), ("la", None)],
)
def test_the_first_remedy_that_matches_is_chosen(featurizer: str, chosen: type[Remedy] | None) -> None:
    assert choose_remedy(find_layers(backbone(featurizer))[-1]) is chosen


@pytest.mark.parametrize("module", [autopilot, treatment])
def test_the_autopilot_and_the_treatment_know_no_remedy(module: Any) -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    words = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    words += [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    for remedy in REMEDIES:
        assert not [text for text in texts if remedy.name in text]
        assert remedy.__name__ not in words


KEYS = [
    "layer",
    "action",
    "finding",
    "rung",
    "strength",
    "step",
    "first_step",
    "recovered_step",
    "loss_at_start",
    "utilization_before",
    "retention_before",
    "trial",
    "copy",
    "factor",
]


@pytest.mark.parametrize("featurizer", ["wla", "s6"])
def test_the_keys_of_state_version_1_are_those_of_0_1_the_trial_and_the_name_of_the_loss(featurizer: str) -> None:
    run = Run(featurizer)
    run.measure(COLLAPSED)
    state = run.pilot.state_dict()
    assert list(state) == ["version", "spent", "given_up", "told", "settings", "loss", "treatments"]
    [treated] = state["treatments"]
    assert list(treated) == KEYS
    if featurizer == "wla":
        assert (treated["copy"], treated["factor"]) == (None, 1.0)
    else:
        assert list(treated["copy"]) == ["tensor", "moments"]
        assert torch.is_tensor(treated["copy"]["tensor"])
        assert treated["factor"] == 100.0
