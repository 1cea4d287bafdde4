"""What the autopilot decides, on real layers and readings that are made up."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ess_monitor.errors import ConfigError
from ess_monitor.interventions import AutopilotConfig
from ess_monitor.records import Condition, Finding
from tests.interventions.helpers import backbone, batch, gradients, pull_on, task_loss
from tests.interventions.pilots import FIRST, LAST, Run, said, weights

COLLAPSED: dict[str, Condition] = {FIRST: "healthy", LAST: "collapsed"}
HEALTHY: dict[str, Condition] = {FIRST: "healthy", LAST: "healthy"}


# -- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["off", "advise"])
@pytest.mark.parametrize("featurizer", ["wla", "gla_s6", "s6"])
def test_off_and_advise_change_no_parameter_no_gradient_and_attach_nothing(mode: str, featurizer: str) -> None:
    run = Run(featurizer, mode=mode)
    task_loss(run.model, batch(0)).backward()
    expected = gradients(run.model)
    before = weights(run.model)
    run.measure(times=10)
    run.measure(broken=True, loss=math.nan)
    assert weights(run.model) == before
    assert run.pulled == []
    task_loss(run.model, batch(0)).backward()
    assert [g.numpy().tobytes() for g in gradients(run.model)] == [g.numpy().tobytes() for g in expected]
    assert run.pilot.budget_remaining == run.pilot.config.budget


def test_off_says_nothing() -> None:
    assert Run("wla", mode="off").measure() == ()


def test_advise_says_once_per_collapse_what_auto_would_do() -> None:
    run = Run("wla", mode="advise")
    assert said(run.measure(COLLAPSED)) == [(LAST, "pull_to_identity", "dry_run", 0.5)]
    assert run.measure(COLLAPSED, times=5) == ()
    run.measure(HEALTHY)
    assert said(run.measure(COLLAPSED)) == [(LAST, "pull_to_identity", "dry_run", 0.5)]


def test_a_bare_mode_is_a_config_and_nonsense_is_an_error() -> None:
    assert AutopilotConfig.model_validate("auto") == AutopilotConfig(mode="auto")
    impossible: list[dict[str, Any]] = [
        {"mode": "on"},
        {"strengths": ()},
        {"strengths": (0.0,)},
        {"alpha_factors": (1.0,)},
        {"alpha_factors": (-1.0,)},
        {"loss_band_ratio": 1.0},
        {"strength": 1.0},
    ]
    for settings in impossible:
        with pytest.raises(ConfigError):
            AutopilotConfig.model_validate(settings)


# -- which layer, which remedy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("featurizer", "action", "strength"),
    [
        ("wla", "pull_to_identity", 0.5),
        ("gla", "pull_to_identity", 0.5),
        ("s6", "rescale_alpha", 100.0),
        ("gla_s6", "rescale_alpha", 100.0),
    ],
)
def test_the_remedy_follows_the_handle_and_the_deepest_layer_comes_first(
    featurizer: str, action: str, strength: float
) -> None:
    run = Run(featurizer)
    before = weights(run.model)
    assert said(run.measure()) == [(LAST, action, "applied", strength)]
    after = weights(run.model)
    changed = [name.rsplit(".", 1)[0] for name in before if after[name] != before[name]]
    assert changed == ([LAST] if action == "rescale_alpha" else [])
    assert run.pulled == ([LAST] if action == "pull_to_identity" else [])


def test_the_pull_that_is_attached_has_the_gradients_of_the_configured_strength() -> None:
    twin = backbone("gla")
    pull_on(twin, 0.25).attach()
    task_loss(twin, batch(0)).backward()
    run = Run("gla", strengths=(0.25,))
    run.measure()
    task_loss(run.model, batch(0)).backward()
    expected = [g.numpy().tobytes() for g in gradients(twin)]
    assert [g.numpy().tobytes() for g in gradients(run.model)] == expected


@pytest.mark.parametrize(("featurizer", "operator"), [("la", "DiagonalRecurrence"), ("sa", "SoftmaxAttention")])
def test_a_layer_without_handle_is_rejected_with_the_reason(featurizer: str, operator: str) -> None:
    [action] = Run(featurizer).measure(COLLAPSED)
    assert said((action,)) == [(LAST, "advise", "rejected", None)]
    assert action.message == f"{operator} of this layer has no handle on its decay"


@pytest.mark.parametrize("retention", [0.7, 0.95, 1.3, None])
def test_where_the_decay_is_not_to_blame_there_is_only_advice(retention: float | None) -> None:
    run = Run("wla")
    [action] = run.measure(COLLAPSED, retention=retention)
    assert said((action,)) == [(LAST, "advise", "dry_run", None)]
    assert "the decay is not to blame" in action.message
    assert run.pulled == []
    assert run.measure(COLLAPSED, retention=retention, times=5) == ()
    assert run.pilot.budget_remaining == run.pilot.config.budget


def test_a_collapse_that_becomes_the_fault_of_the_decay_is_answered_again() -> None:
    run = Run("wla")
    assert said(run.measure(COLLAPSED, retention=0.9)) == [(LAST, "advise", "dry_run", None)]
    assert said(run.measure(COLLAPSED, retention=0.5)) == [(LAST, "pull_to_identity", "applied", 0.5)]


def test_advice_for_the_deepest_layer_lets_the_next_one_be_treated() -> None:
    run = Run("wla")
    actions = run.measure(retention={FIRST: 0.5, LAST: 0.95})
    assert said(actions) == [(LAST, "advise", "dry_run", None), (FIRST, "pull_to_identity", "applied", 0.5)]


def test_one_layer_at_a_time_and_the_next_when_the_first_is_done() -> None:
    run = Run("gla_s6")
    assert [action.layer for action in run.measure()] == [LAST]
    assert run.measure() == ()
    done: dict[str, Condition] = {FIRST: "collapsed", LAST: "healthy"}
    assert said(run.measure(done)) == [(LAST, "rescale_alpha", "recovered", 100.0)]
    assert run.measure(done, times=2) == ()
    assert said(run.measure(done)) == [(FIRST, "rescale_alpha", "applied", 100.0)]


def test_as_many_layers_at_a_time_as_configured() -> None:
    run = Run("wla", max_layers=2)
    assert [action.layer for action in run.measure()] == [LAST, FIRST]
    assert run.pulled == [FIRST, LAST]


def test_a_layer_that_was_not_measured_is_not_treated() -> None:
    run = Run("wla")
    assert run.pilot.act(100, [], {LAST: "collapsed"}, metrics={"loss": 1.0}) == ()
    assert run.pulled == []


# -- the ladder -------------------------------------------------------------------------------------------------------


def test_the_pull_climbs_its_ladder_after_each_cooldown_and_is_given_up_at_the_end() -> None:
    run = Run("wla")
    assert said(run.measure(COLLAPSED)) == [(LAST, "pull_to_identity", "applied", 0.5)]
    assert run.measure(COLLAPSED) == ()  # 100 of 200 steps of cool-down
    assert said(run.measure(COLLAPSED)) == [(LAST, "pull_to_identity", "applied", 2.0)]
    assert [treatment.strength for treatment in run.pilot.active] == [2.0]
    assert run.pulled == [LAST]
    assert run.measure(COLLAPSED) == ()
    [failed] = run.measure(COLLAPSED)
    assert said((failed,)) == [(LAST, "pull_to_identity", "failed", 2.0)]
    assert "no further rung" in failed.message
    assert (failed.utilization_before, failed.utilization_after) == (0.15, 0.15)
    assert run.pulled == []
    assert run.pilot.active == ()
    assert run.measure(COLLAPSED, times=20) == ()  # given up is given up


def test_alpha_climbs_by_multiplication_and_stays_when_it_is_given_up() -> None:
    run = Run("gla_s6")
    log_alpha = run.model.blocks[1].mixer.log_alpha
    before = log_alpha.item()
    outcomes = [said(run.measure(COLLAPSED)) for _ in range(5)]
    assert [entry[2:] for actions in outcomes for entry in actions] == [
        ("applied", 100.0),
        ("applied", 10.0),
        ("failed", 10.0),
    ]
    assert log_alpha.item() == pytest.approx(before + math.log(1000))


def test_the_budget_ends_a_ladder_and_forbids_new_treatments() -> None:
    run = Run("wla", budget=1)
    run.measure()
    assert run.pilot.budget_remaining == 0
    actions = run.measure(times=2)
    assert said(actions) == [(LAST, "pull_to_identity", "failed", 0.5), (FIRST, "advise", "rejected", None)]
    assert "budget" in actions[0].message
    assert "raise autopilot.budget" in actions[1].message
    assert run.pulled == []
    assert run.measure(times=10) == ()


# -- recovery ---------------------------------------------------------------------------------------------------------


def test_a_recovered_layer_is_released_after_its_time() -> None:
    run = Run("wla")
    run.measure(COLLAPSED)
    [recovered] = run.measure(HEALTHY, retention=0.98)
    assert said((recovered,)) == [(LAST, "pull_to_identity", "recovered", 0.5)]
    assert (recovered.retention_before, recovered.retention_after) == (0.5, 0.98)
    assert run.pulled == [LAST]
    assert run.measure(HEALTHY, times=2) == ()
    assert said(run.measure(HEALTHY)) == [(LAST, "pull_to_identity", "released", 0.5)]
    assert run.pulled == []
    assert run.pilot.active == ()


def test_a_collapse_during_the_wait_starts_the_wait_anew() -> None:
    run = Run("wla", cooldown_steps=1000)
    run.measure(COLLAPSED)
    run.measure(HEALTHY, times=3)
    assert run.measure(COLLAPSED) == ()
    assert run.pulled == [LAST]
    assert [action.outcome for action in run.measure(HEALTHY)] == ["recovered"]
    assert run.measure(HEALTHY, times=2) == ()
    assert [action.outcome for action in run.measure(HEALTHY)] == ["released"]


def test_a_collapse_during_the_wait_climbs_once_the_cooldown_is_over() -> None:
    run = Run("wla")
    run.measure(COLLAPSED)
    run.measure(HEALTHY, times=2)
    assert said(run.measure(COLLAPSED)) == [(LAST, "pull_to_identity", "applied", 2.0)]


def test_an_unknown_condition_neither_recovers_nor_escalates() -> None:
    run = Run("wla")
    run.measure(COLLAPSED)
    assert run.measure({LAST: "unknown"}, times=10) == ()
    assert run.pulled == [LAST]


def test_a_pull_that_is_never_to_be_released_stays() -> None:
    run = Run("wla", release_steps=None)
    run.measure(COLLAPSED)
    assert [action.outcome for action in run.measure(HEALTHY)] == ["recovered"]
    assert run.measure(HEALTHY, times=20) == ()
    assert run.pulled == [LAST]


def test_a_released_layer_that_collapses_again_is_treated_again() -> None:
    run = Run("wla")
    run.measure(COLLAPSED)
    run.measure(HEALTHY, times=4)
    assert run.pulled == []
    assert said(run.measure(COLLAPSED)) == [(LAST, "pull_to_identity", "applied", 0.5)]
    assert run.pilot.budget_remaining == run.pilot.config.budget - 2


# -- roll-back --------------------------------------------------------------------------------------------------------

BREAKS: dict[str, dict[str, Any]] = {
    "seen by the loop": {"broken": True},
    "not a number": {"loss": math.nan},
    "infinite": {"loss": math.inf},
    "out of the band": {"loss": 3.01},
}


@pytest.mark.parametrize("signs", BREAKS.values(), ids=BREAKS)
@pytest.mark.parametrize("featurizer", ["gla_s6", "s6"])
def test_a_broken_loss_brings_alpha_and_its_moments_back_bitwise(featurizer: str, signs: dict[str, Any]) -> None:
    run = Run(featurizer)
    run.train(3)
    before = weights(run.model)
    moments = str(run.optimizer.state_dict())
    run.measure(COLLAPSED, loss=1.0)
    run.measure(COLLAPSED, loss=1.0, times=2)  # a second rung: the roll-back goes to the very beginning
    assert weights(run.model) != before
    [action] = run.measure(COLLAPSED, **signs)
    assert said((action,)) == [(LAST, "rescale_alpha", "rolled_back", 10.0)]
    assert weights(run.model) == before
    assert str(run.optimizer.state_dict()) == moments
    assert run.measure(COLLAPSED, times=20) == ()


def test_a_recovered_alpha_is_watched_over_until_its_time_is_over() -> None:
    for times, outcomes in ((3, ["rolled_back"]), (4, [])):
        run = Run("gla_s6")
        before = weights(run.model)
        run.measure(COLLAPSED)
        run.measure(HEALTHY, times=times)  # 300 steps after the recovery, at the fourth, it is over
        assert [action.outcome for action in run.measure(HEALTHY, broken=True)] == outcomes
        assert (weights(run.model) == before) == bool(outcomes)


def test_a_relapse_of_a_recovered_alpha_climbs_instead_of_starting_anew() -> None:
    run = Run("gla_s6")
    run.measure(COLLAPSED)
    run.measure(HEALTHY, times=2)
    assert said(run.measure(COLLAPSED)) == [(LAST, "rescale_alpha", "applied", 10.0)]


@pytest.mark.parametrize("signs", BREAKS.values(), ids=BREAKS)
def test_a_broken_loss_takes_the_pull_off_for_good(signs: dict[str, Any]) -> None:
    run = Run("gla")
    run.measure(COLLAPSED, loss=1.0)
    [action] = run.measure(COLLAPSED, **signs)
    assert said((action,)) == [(LAST, "pull_to_identity", "rolled_back", 0.5)]
    assert run.pulled == []
    assert run.measure(COLLAPSED, times=20) == ()


@pytest.mark.parametrize(("start", "inside", "outside"), [(1.0, 3.0, 3.1), (0.1, 0.29, 0.31), (-2.0, 1.9, 2.1)])
def test_the_band_is_as_wide_below_zero(start: float, inside: float, outside: float) -> None:
    """loss - start may grow to (ratio - 1) |start|: for a positive loss that is ratio times its start."""
    run = Run("wla", cooldown_steps=10_000)
    run.measure(COLLAPSED, loss=start)
    assert run.measure(COLLAPSED, loss=inside) == ()
    assert [action.outcome for action in run.measure(COLLAPSED, loss=outside)] == ["rolled_back"]


def test_without_a_band_only_a_loss_that_is_not_finite_counts() -> None:
    run = Run("wla", loss_band_ratio=None, cooldown_steps=10_000)
    run.measure(COLLAPSED, loss=1.0)
    assert run.measure(COLLAPSED, loss=1e9) == ()
    assert [action.outcome for action in run.measure(COLLAPSED, loss=math.inf)] == ["rolled_back"]


def test_a_run_without_a_known_loss_is_not_rolled_back() -> None:
    run = Run("wla", cooldown_steps=10_000)
    run.measure(COLLAPSED, loss=None)
    assert run.measure(COLLAPSED, loss=None, times=3) == ()
    assert run.measure(COLLAPSED, loss=1e9) == ()
    assert run.pulled == [LAST]


@pytest.mark.parametrize("signs", [{"broken": True}, {"loss": math.nan}])
def test_nothing_is_begun_while_the_loss_is_broken(signs: dict[str, Any]) -> None:
    run = Run("wla")
    assert run.measure(COLLAPSED, **signs) == ()
    assert run.pulled == []
    assert [action.outcome for action in run.measure(COLLAPSED)] == ["applied"]


# -- saturation, end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["advise", "auto"])
def test_a_full_layer_gets_advice_with_a_state_size_and_nothing_else(mode: str) -> None:
    run = Run("gla", mode=mode)
    full = Finding(step=100, layer=LAST, condition="saturated", previous="healthy", reason="full", utilization_ratio=1)
    [action] = run.measure({LAST: "saturated"}, retention=1.0, findings=(full,))
    assert said((action,)) == [(LAST, "advise", "dry_run", None)]
    assert "train with 8 dimensions" in action.message  # the made-up layer has 4
    assert run.pulled == []
    assert run.measure({LAST: "saturated"}, retention=1.0, times=3) == ()


def test_closing_leaves_every_forward_pass() -> None:
    run = Run("wla", max_layers=2)
    run.measure()
    assert run.pulled == [FIRST, LAST]
    run.pilot.close()
    run.pilot.close()
    assert run.pulled == []
