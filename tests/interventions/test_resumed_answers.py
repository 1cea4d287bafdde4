"""After a resume, what an autopilot said and gave up stands only under the settings that it was said with."""

from __future__ import annotations

from typing import Any

import pytest

from ess_monitor.errors import CheckpointError
from ess_monitor.interventions.remedies import RescaleAlpha
from tests.interventions.pilots import LAST, Run, said
from tests.interventions.test_autopilot_state import COLLAPSED, resumed


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
