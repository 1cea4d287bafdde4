"""A resumed autopilot goes on exactly as the uninterrupted one would have."""

from __future__ import annotations

import copy
import io
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ess_monitor.errors import CheckpointError
from ess_monitor.records import Action, Condition
from tests.interventions.helpers import backbone, batch, gradients, task_loss
from tests.interventions.pilots import FIRST, LAST, Run, said, weights

COLLAPSED: dict[str, Condition] = {FIRST: "healthy", LAST: "collapsed"}
HEALTHY: dict[str, Condition] = {FIRST: "healthy", LAST: "healthy"}


class Event(NamedTuple):
    """One measurement."""

    first: Condition
    last: Condition
    retention: float | None
    loss: float | None


CONDITIONS = st.sampled_from(["collapsed", "collapsed", "collapsed", "healthy", "saturated", "unknown"])
EVENTS = st.lists(
    st.builds(
        Event,
        CONDITIONS,
        CONDITIONS,
        st.sampled_from([0.3, 0.3, 0.3, 0.9, None]),
        st.sampled_from([1.0, 1.0, 1.0, 1.0, 1.0, 9.0, float("nan"), None]),
    ),
    min_size=2,
    max_size=12,
)


def saved_and_loaded(state: Any) -> Any:
    """As it comes back from a checkpoint: plain values and tensors only."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def resumed(run: Run, featurizer: str, **options: Any) -> Run:
    """The same run in a new process: nothing is shared but what was saved."""
    checkpoint = saved_and_loaded(
        {
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "pilot": run.pilot.state_dict(),
        }
    )
    other = Run(featurizer, **options)
    other.model.load_state_dict(checkpoint["model"])
    other.optimizer.load_state_dict(checkpoint["optimizer"])
    other.pilot.load_state_dict(checkpoint["pilot"])
    other.step = run.step
    return other


def go_through(run: Run, event: Event) -> tuple[Action, ...]:
    run.train()
    return run.measure({FIRST: event.first, LAST: event.last}, retention=event.retention, loss=event.loss)


@settings(max_examples=10)
@given(events=EVENTS, featurizer=st.sampled_from(["gla", "gla_s6", "s6"]), max_layers=st.integers(1, 2))
def test_a_run_resumed_after_every_measurement_equals_the_uninterrupted_one(
    events: list[Event], featurizer: str, max_layers: int
) -> None:
    options = {"max_layers": max_layers, "budget": 4}
    whole, pieces = Run(featurizer, **options), Run(featurizer, **options)
    for event in events:
        assert go_through(pieces, event) == go_through(whole, event)
        pieces = resumed(pieces, featurizer, **options)
        assert pieces.pulled == whole.pulled
        assert pieces.pilot.budget_remaining == whole.pilot.budget_remaining
        assert len(pieces.pilot.active) == len(whole.pilot.active)
    whole.train(2)
    pieces.train(2)
    assert weights(pieces.model) == weights(whole.model)
    assert str(pieces.optimizer.state_dict()) == str(whole.optimizer.state_dict())


def test_saving_changes_nothing_and_a_state_is_not_changed_by_going_on() -> None:
    run = Run("gla_s6")
    run.train(2)
    run.measure(COLLAPSED)
    state = run.pilot.state_dict()
    kept = copy.deepcopy(state)
    assert str(run.pilot.state_dict()) == str(kept)
    run.train(2)
    run.measure(COLLAPSED, times=2)
    run.measure(COLLAPSED, loss=99.0)
    assert str(state) == str(kept)


def test_a_pull_is_attached_again_with_the_strength_it_had() -> None:
    run = Run("wla")
    run.measure(COLLAPSED, times=3)
    other = resumed(run, "wla")
    assert other.pulled == [LAST]
    found = []
    for each in (run, other):
        task_loss(each.model, batch(0)).backward()
        found.append([g.numpy().tobytes() for g in gradients(each.model)])
    assert found[0] == found[1]


def test_a_roll_back_after_a_resume_goes_to_the_state_before_the_treatment() -> None:
    run = Run("s6")
    run.train(3)
    before, moments = weights(run.model), str(run.optimizer.state_dict())
    run.measure(COLLAPSED)
    other = resumed(run, "s6")
    assert [action.outcome for action in other.measure(COLLAPSED, loss=99.0)] == ["rolled_back"]
    assert weights(other.model) == before
    assert str(other.optimizer.state_dict()) == moments


def test_loading_twice_attaches_once_and_an_empty_state_detaches() -> None:
    run = Run("wla")
    empty = run.pilot.state_dict()
    run.measure(COLLAPSED)
    state = run.pilot.state_dict()
    run.pilot.load_state_dict(state)
    run.pilot.load_state_dict(state)
    core = run.model.blocks[1].mixer.core
    assert len(core._forward_pre_hooks) == 1
    run.pilot.load_state_dict(empty)
    assert run.pulled == []
    assert said(run.measure(COLLAPSED)) == [(LAST, "pull_to_identity", "applied", 0.5)]


@pytest.mark.parametrize("mode", ["off", "advise"])
@pytest.mark.parametrize("featurizer", ["wla", "gla_s6"])
def test_resumed_in_a_mode_that_does_not_act_nothing_is_attached_and_nothing_changes(
    mode: str, featurizer: str
) -> None:
    run = Run(featurizer)
    run.train()
    run.measure(COLLAPSED)
    other = resumed(run, featurizer, mode=mode)
    before = weights(other.model)
    assert other.pulled == []
    assert other.pilot.active == ()
    assert all(action.outcome == "dry_run" for action in other.measure(COLLAPSED))
    other.measure(COLLAPSED, loss=99.0, times=5)
    assert weights(other.model) == before
    assert other.pulled == []


def test_what_was_said_is_not_said_again_after_a_resume() -> None:
    run = Run("wla", mode="advise")
    assert len(run.measure()) == 2
    assert resumed(run, "wla", mode="advise").measure() == ()


def test_a_state_that_cannot_be_used_is_an_error_and_leaves_the_pilot_as_it_was() -> None:
    run = Run("wla")
    run.measure(COLLAPSED)
    state = run.pilot.state_dict()
    [treatment] = state["treatments"]
    unusable: list[tuple[dict[str, Any], str]] = [
        ({**state, "version": 99}, "state version 99"),
        ({}, "state version None"),
        ({**state, "treatments": [{**treatment, "layer": "blocks.7.mixer"}]}, r"\['blocks.7.mixer'\]"),
        ({**state, "treatments": [{**treatment, "action": "rescale_alpha"}]}, "none with that handle"),
    ]
    for broken, message in unusable:
        with pytest.raises(CheckpointError, match=message):
            run.pilot.load_state_dict(broken)
        assert run.pulled == [LAST]
        assert str(run.pilot.state_dict()) == str(state)


def test_the_model_that_runs_under_a_treatment_has_the_usual_state_dict() -> None:
    run = Run("wla")
    run.measure(COLLAPSED)
    assert list(run.model.state_dict()) == list(backbone("wla").state_dict())
