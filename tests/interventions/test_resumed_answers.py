"""After a resume, what an autopilot said and gave up stands only under the settings that it was said with."""

from __future__ import annotations

from typing import Any

import pytest

from ess_monitor.errors import CheckpointError
from ess_monitor.interventions.remedies import RescaleAlpha
from ess_monitor.records import Changes
from tests.exporters.helpers import evidence as seen_evidence
from tests.interventions.helpers import batch, gradients, task_loss
from tests.interventions.pilots import LAST, Run, reading, said, weights
from tests.interventions.test_autopilot_state import COLLAPSED, resumed, saved_and_loaded


@pytest.mark.parametrize("featurizer", ["wla", "gla_s6"])
def test_what_was_only_advised_on_is_treated_after_a_resume_in_mode_auto(featurizer: str) -> None:
    run = Run(featurizer, mode="advise")
    [advice] = run.measure(COLLAPSED)
    assert advice.outcome == "dry_run"
    other = resumed(run, featurizer, mode="auto")
    [action] = other.measure(COLLAPSED)
    assert (action.layer, action.action, action.outcome) == (LAST, advice.action, "applied")


def test_a_layer_that_the_spent_budget_kept_from_treatment_is_treated_under_a_larger_one() -> None:
    run = Run("wla", budget=0)
    assert [action.outcome for action in run.measure(COLLAPSED)] == ["rejected"]
    assert resumed(run, "wla", budget=0).measure(COLLAPSED) == ()
    assert said(resumed(run, "wla", budget=1).measure(COLLAPSED)) == [(LAST, "pull_to_identity", "applied", 0.5)]


def test_a_layer_whose_obstacle_is_gone_after_a_resume_is_treated(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("gla_s6")
    with monkeypatch.context() as patch:
        patch.setattr(RescaleAlpha, "obstacle", classmethod(lambda cls, layer: "alpha cannot be changed here"))
        assert [action.message for action in run.measure(COLLAPSED)] == ["alpha cannot be changed here"]
        assert resumed(run, "gla_s6").measure(COLLAPSED) == ()
    assert said(resumed(run, "gla_s6").measure(COLLAPSED)) == [(LAST, "rescale_alpha", "applied", 100.0)]


def test_a_decay_that_is_not_to_blame_is_no_more_treated_after_a_resume_in_mode_auto() -> None:
    run = Run("wla", mode="advise")
    assert len(run.measure(COLLAPSED, retention=0.9)) == 1
    other = resumed(run, "wla", mode="auto")
    assert [action.outcome for action in other.measure(COLLAPSED, retention=0.9, times=2)] == []
    assert [action.outcome for action in other.measure(COLLAPSED)] == ["applied"]


@pytest.mark.parametrize(
    "changed", [{"mode": "auto", "budget": 0}, {"budget": 3}, {"strengths": (1.0,)}, {"max_layers": 2}]
)
def test_advice_is_given_anew_where_the_settings_that_it_rests_on_have_changed(changed: dict[str, Any]) -> None:
    run = Run("wla", mode="advise")
    run.measure(COLLAPSED)
    assert resumed(run, "wla", mode="advise", cooldown_steps=400).measure(COLLAPSED) == ()
    [action] = resumed(run, "wla", **{"mode": "advise", **changed}).measure(COLLAPSED)
    assert action.outcome in ("dry_run", "rejected")


def given_up(how: str) -> Run:
    run = Run("wla", budget=2)
    if how == "rolled back":
        run.measure(COLLAPSED)
        assert [action.outcome for action in run.measure(COLLAPSED, loss=99.0)] == ["rolled_back"]
    else:
        assert [action.outcome for action in run.measure(COLLAPSED, times=5)] == ["failed"]
    assert run.pilot.state_dict()["given_up"] == [LAST]
    return run


@pytest.mark.parametrize("how", ["rolled back", "end of the ladder"])
@pytest.mark.parametrize("same", [{}, {"max_layers": 2}, {"cooldown_steps": 100}])
def test_a_layer_that_was_given_up_stays_so_under_the_same_ladder_and_budget(how: str, same: dict[str, Any]) -> None:
    run = resumed(given_up(how), "wla", **{"budget": 2, **same})
    assert run.measure(COLLAPSED, times=5) == ()
    # Through a leg in which nothing is done, too.
    other = resumed(resumed(run, "wla", mode="advise", budget=2), "wla", budget=2)
    assert other.measure(COLLAPSED, times=5) == ()


@pytest.mark.parametrize("changed", [{"budget": 6}, {"strengths": (8.0,), "budget": 4}])
@pytest.mark.parametrize("how", ["rolled back", "end of the ladder"])
def test_a_layer_that_was_given_up_is_treated_under_another_ladder_or_budget(how: str, changed: dict[str, Any]) -> None:
    [action] = resumed(given_up(how), "wla", **changed).measure(COLLAPSED)
    assert (action.outcome, action.strength) == ("applied", changed.get("strengths", (0.5,))[0])


@pytest.mark.parametrize(
    ("ladder", "rungs", "strengths"),
    [
        ((0.1,), 1, [0.1]),
        ((0.1, 8.0), 1, [0.1, 8.0]),
        ((0.25, 4.0), 2, [4.0]),
        ((0.25,), 2, [0.25]),
        ((0.5, 2.0, 8.0), 2, [2.0, 8.0]),
        ((0.5, 2.0), 2, [2.0]),
    ],
)
def test_a_regularizer_takes_over_the_ladder_of_the_resumed_run(
    ladder: tuple[float, ...], rungs: int, strengths: list[float]
) -> None:
    run = Run("wla", strengths=(0.5, 2.0))
    run.measure(COLLAPSED, times=1 if rungs == 1 else 3)
    assert [treatment.strength for treatment in run.pilot.active] == [(0.5, 2.0)[rungs - 1]]
    other = resumed(run, "wla", strengths=ladder)
    fresh = Run("wla", strengths=ladder[min(rungs, len(ladder)) - 1 :][:1])
    fresh.model.load_state_dict(other.model.state_dict())
    fresh.measure(COLLAPSED)
    seen = []
    for each in (other, fresh):  # the strength that is at work, and not only the one that is told
        task_loss(each.model, batch(0)).backward()
        seen.append([gradient.numpy().tobytes() for gradient in gradients(each.model)])
    assert seen[0] == seen[1]
    applied = [other.pilot.active[0].strength]
    for _ in range(9):
        applied += [action.strength for action in other.measure(COLLAPSED) if action.outcome == "applied"]
    assert applied == strengths
    assert other.pilot.active == ()


@pytest.mark.parametrize("factors", [(1000.0,), (2.0, 5.0)])
def test_an_alpha_that_was_rescaled_stays_and_the_next_rung_is_of_the_present_ladder(
    factors: tuple[float, ...],
) -> None:
    run = Run("gla_s6", alpha_factors=(100.0, 10.0))
    run.measure(COLLAPSED)
    other = resumed(run, "gla_s6", alpha_factors=factors)
    assert weights(other.model) == weights(run.model)
    actions = [action for _ in range(4) for action in other.measure(COLLAPSED) if action.outcome != "dry_run"]
    assert (actions[0].outcome, actions[0].strength) == (
        ("applied", factors[1]) if len(factors) > 1 else ("failed", 100.0)
    )


@pytest.mark.parametrize(("loss", "outcome"), [("loss", "rolled_back"), ("eval_loss", None)])
def test_the_loss_at_the_start_of_a_treatment_counts_against_the_same_loss(loss: str, outcome: str | None) -> None:
    run = Run("wla")
    run.measure(COLLAPSED, loss=1.0)
    other = resumed(run, "wla", loss=loss)
    actions = other.pilot.act(
        other.step + 100, [reading(other.step, LAST)], COLLAPSED, (), {loss: 50.0}, optimizer=other.optimizer
    )
    assert [action.outcome for action in actions] == ([] if outcome is None else [outcome])


@pytest.mark.parametrize("checks", [(500,), (50, 500), (300, 600), (100,)])
def test_a_trial_under_way_ends_under_other_checks(checks: tuple[int, ...]) -> None:
    def treated(**probation: Any) -> Run:
        return Run(
            "wla", cooldown_steps=9000, probation={"silent_patience_steps": 900, "patience_steps": 900, **probation}
        )

    run = treated(checks=(150, 800))
    evidence = {LAST: seen_evidence(LAST)}
    options: dict[str, Any] = {"optimizer": run.optimizer, "evidence": evidence}
    run.pilot.act(100, [reading(100, LAST)], COLLAPSED, **options)
    assert list(run.pilot.comparisons(210, 50)) == [LAST]  # the first comparison is under way
    other = treated(checks=checks)
    other.pilot.load_state_dict(saved_and_loaded(run.pilot.state_dict()))
    compared, outcomes = [], []
    for step in range(300, 1600, 100):
        due = other.pilot.comparisons(step, 50)
        compared += [step] * len(due)
        sums = {name: Changes(4, 12.0, first=0.0, kind="trial") for name in due}
        actions = other.pilot.act(
            step, [reading(step, LAST)], COLLAPSED, optimizer=other.optimizer, evidence=evidence, comparisons=sums
        )
        outcomes += [(step, action.outcome) for action in actions]
        if outcomes:
            break
    assert bool(compared) == (checks[-1] > 150)
    assert outcomes == [(1000, "rolled_back")]


def test_a_state_that_does_not_name_its_settings_lets_advice_be_followed_and_keeps_what_was_given_up() -> None:
    advised, lost = Run("wla", mode="advise"), given_up("end of the ladder")
    advised.measure(COLLAPSED)
    for run, options, outcomes in (
        (advised, {"mode": "advise"}, []),
        (advised, {"mode": "auto"}, ["applied"]),
        (lost, {"budget": 9, "strengths": (8.0,)}, []),
    ):
        state = run.pilot.state_dict()
        del state["settings"]
        other = Run("wla", **options)
        other.pilot.load_state_dict(state)
        assert [action.outcome for action in other.measure(COLLAPSED)] == outcomes


@pytest.mark.parametrize("broken", [3, {"mode": "auto"}, {"mode": 1}, []])
def test_settings_of_a_state_that_cannot_be_read_are_refused(broken: Any) -> None:
    run = Run("wla")
    run.measure(COLLAPSED)
    state = run.pilot.state_dict()
    with pytest.raises(CheckpointError, match="settings"):
        run.pilot.load_state_dict({**state, "settings": broken})
    assert str(run.pilot.state_dict()) == str(state)
