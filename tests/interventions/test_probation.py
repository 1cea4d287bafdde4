"""A treatment is compared with the gate from before it: taken back on harm or without gain, kept on a gain."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from ess_monitor.capture import find_layers
from ess_monitor.interventions.gate import gate_tensors
from ess_monitor.records import Action, Changes, Condition, Evidence
from tests.interventions.pilots import FIRST, LAST, Run, reading

HARM = Changes(8, 16.0, -0.8, first_squared=0.081, kind="trial")
"""The gate from before is 5 % better, in every batch."""
GAIN = Changes(8, 16.0, 4.0, first_squared=2.01, kind="trial")
NOTHING = Changes(8, 16.0, 1e-6, first_squared=1e-12, kind="trial")
NOISE = Changes(8, 16.0, -0.8, first_squared=20.0, kind="trial")
UNSEEN = Changes(kind="trial")


def evidence(outcome: str = "loud", basis: str = "loss") -> dict[str, Evidence]:
    numbers = {"base": 2.0, "m50": 0.0, "m90": 0.0, "cut": 0.5}
    found = Evidence(step=0, layer=LAST, basis=basis, batches=8, outcome=outcome, reason="seen", **numbers)
    return {LAST: found}


class Trial(Run):
    """A run of a treated layer whose comparisons are answered as soon as they are asked for."""

    def __init__(self, featurizer: str = "wla", **settings: object) -> None:
        super().__init__(featurizer, cooldown_steps=1000, **settings)
        self.compared: list[int] = []
        self.known = evidence()

    def answer(
        self, changes: Changes | None, *, condition: Condition = "collapsed", solved: bool | None = None
    ) -> tuple[Action, ...]:
        """One measurement, 100 steps later; the comparison that was asked for in between gave `changes`."""
        asked = self.pilot.comparisons(self.step, 50) if self.step else {}
        given = {name: changes for name in asked if changes is not None}
        if asked:
            self.compared.append(self.step)
        self.step += 100
        return self.pilot.act(
            self.step,
            [reading(self.step, LAST)],
            {FIRST: "healthy", LAST: condition},
            (),
            {"loss": 1.0},
            optimizer=self.optimizer,
            evidence=self.known,
            comparisons=given,
            task_solved=solved,
        )

    def until(self, step: int, changes: Changes | None, **named: Any) -> list[Action]:
        found: list[Action] = []
        while self.step < step:
            found += self.answer(changes, **named)
        return found


def outcomes(actions: object) -> list[str]:
    return [action.outcome for action in actions]


@pytest.mark.parametrize("featurizer", ["wla", "gla", "gla_s6"])
def test_harm_within_a_hundred_steps_takes_the_treatment_back_bit_for_bit(featurizer: str) -> None:
    run = Trial(featurizer)
    run.train(3)
    before = {name: tensor.detach().clone() for name, tensor in gate_tensors(find_layers(run.model)[-1]).items()}
    moments = copy.deepcopy([run.optimizer.state[t] for t in gate_tensors(find_layers(run.model)[-1]).values()])
    [applied] = run.answer(None)
    assert applied.outcome == "applied"
    run.train(3)
    actions = run.answer(HARM)
    assert outcomes(actions) == ["rolled_back"]
    assert "5.000% lower with the gate from before" in actions[0].message
    for name, tensor in gate_tensors(find_layers(run.model)[-1]).items():
        assert torch.equal(tensor, before[name]), name
    for state, tensor in zip(moments, gate_tensors(find_layers(run.model)[-1]).values(), strict=True):
        assert all(torch.equal(value, run.optimizer.state[tensor][key]) for key, value in state.items())
    assert run.until(1500, NOTHING) == [], "a layer whose treatment did harm is given up"


def test_gates_are_compared_at_the_configured_steps() -> None:
    run = Trial(probation={"checks": (25, 300, 900), "patience_steps": 2000, "silent_patience_steps": 3000})
    run.until(1500, NOTHING)
    begun = [step - 100 for step in run.compared]  # the treatment began at 100
    assert begun == [0, 300, 900]


@pytest.mark.parametrize(("outcome", "patience"), [("loud", 400), ("silent", 1000)])
def test_without_a_gain_in_time_it_is_taken_back(outcome: str, patience: int) -> None:
    run = Trial()
    run.known = evidence(outcome)
    assert outcomes(run.until(100 + patience, NOTHING)) == ["applied"]
    last = run.until(400 + patience, NOTHING)
    assert outcomes(last) == ["rolled_back"]
    assert last[0].step <= 200 + patience


@pytest.mark.parametrize("solved", [None, True])
def test_an_unused_layer_is_not_treated_unless_the_task_is_unsolved(solved: bool | None) -> None:
    run = Trial()
    run.known = evidence("silent")
    assert run.until(2000, NOTHING, condition="unused", solved=solved) == []
    actions = run.until(2000 + 400, GAIN, condition="unused", solved=False)
    assert outcomes(actions) == ["applied"]
    assert actions[0].finding == "unused"


def test_a_treatment_of_an_unused_layer_is_followed_as_one_of_a_collapsed_layer() -> None:
    run = Trial()
    run.known = evidence("silent")
    unsolved: dict[str, Any] = {"condition": "unused", "solved": False}
    [applied, *later] = run.until(1100, GAIN, **unsolved)
    assert (applied.outcome, [action.outcome for action in later]) == ("applied", ["applied"]), "the next rung"
    assert "still unused after 1000 steps" in later[0].message
    assert outcomes(run.until(2000, GAIN, condition="healthy")) == ["recovered", "released"]


def test_noise_is_no_harm() -> None:
    assert outcomes(Trial().until(300, NOISE)) == ["applied"]


def test_a_comparison_that_could_not_be_made_is_no_gain() -> None:
    assert outcomes(Trial().until(800, UNSEEN)) == ["applied", "rolled_back"]


def test_esss_recovery_alone_releases_nothing() -> None:
    run = Trial(probation={"patience_steps": 5000, "silent_patience_steps": 5000})
    run.answer(None)
    assert outcomes(run.until(2000, NOTHING, condition="healthy")) == ["recovered"]
    assert len(run.pilot.active) == 1


def test_a_gain_releases_after_recovery() -> None:
    run = Trial()
    run.answer(None)
    assert outcomes(run.until(1500, GAIN, condition="healthy")) == ["recovered", "released"]
    assert run.pilot.comparisons(run.step, 10_000) == {}


def test_a_solved_task_is_a_gain() -> None:
    run = Trial()
    run.answer(None)
    assert outcomes(run.until(1500, NOTHING, condition="healthy", solved=True)) == ["recovered", "released"]


def test_a_gain_that_other_weights_have_adapted_to_is_no_early_gain() -> None:
    run = Trial()
    run.until(300, GAIN)  # the comparisons of 25 and 100 steps
    assert not run.pilot.active[0].trial.has_gained
    run.until(700, GAIN)
    assert run.pilot.active[0].trial.has_gained


@pytest.mark.parametrize("known", [{}, evidence(basis="kl")])
def test_auto_without_the_loss_advises_once_and_says_why(known: dict[str, Evidence]) -> None:
    run = Trial()
    run.known = known
    [action] = run.until(1000, None)
    assert (action.action, action.outcome) == ("pull_to_identity", "dry_run")
    assert "replay=" in action.message


@pytest.mark.parametrize("featurizer", ["wla", "gla_s6"])
def test_a_trial_goes_through_a_checkpoint(featurizer: str) -> None:
    run = Trial(featurizer)
    run.train(3)
    before = {name: tensor.detach().clone() for name, tensor in gate_tensors(find_layers(run.model)[-1]).items()}
    run.answer(None)
    run.train(3)
    run.pilot.comparisons(run.step, 50)  # one is under way when the run ends
    saved = copy.deepcopy(run.pilot.state_dict())
    run.pilot.close()
    run.pilot = run.new_pilot(cooldown_steps=1000)
    run.pilot.load_state_dict(saved)
    assert outcomes(run.answer(HARM)) == ["rolled_back"]
    for name, tensor in gate_tensors(find_layers(run.model)[-1]).items():
        assert torch.equal(tensor, before[name]), name


def test_a_trial_that_resumes_without_its_gate_ends_in_time() -> None:
    run = Trial()
    run.answer(None)
    saved = copy.deepcopy(run.pilot.state_dict())
    saved["treatments"][0]["trial"]["gate"] = None
    run.pilot.close()
    run.pilot = run.new_pilot(cooldown_steps=1000)
    run.pilot.load_state_dict(saved)
    assert outcomes(run.until(1000, None)) == ["rolled_back"]
