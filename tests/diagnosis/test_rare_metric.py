"""A metric that is computed more rarely than layers are measured: only its new values count."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ess_monitor.diagnosis import DiagnosisConfig, Tracker
from tests.diagnosis.helpers import TASK, Run, reading

LOW, FULL = reading(0.2, 0.5), reading(1.0)
LEARNS = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.97)
STUCK = (0.25, 0.26, 0.24, 0.25, 0.26, 0.25)


def by_epoch(values: Iterable[float], length: int, *, repeats: bool = True) -> Iterator[float | None]:
    """A value at the end of each epoch of `length` measurements, and until the next one again or not at all."""
    last: float | None = None
    for value in values:
        yield from [last if repeats else None] * (length - 1)
        last = value
        yield value


def after(run: Run, item: object, accuracies: Iterable[float | None]) -> Run:
    for accuracy in accuracies:
        run.measure(item, accuracy=accuracy, repeated=True)  # type: ignore[arg-type]
    return run


@pytest.mark.parametrize("item", [LOW, FULL, reading(0.2, 0.95)], ids=["low", "full", "low and kept"])
@pytest.mark.parametrize("length", [5, 10, 25, 60])
@pytest.mark.parametrize("repeats", [True, False], ids=["repeated", "given once"])
def test_a_run_that_learns_from_epoch_to_epoch_is_left_alone(item: object, length: int, repeats: bool) -> None:
    config = TASK.model_copy(update={"warmup_steps": 100 * length})
    run = after(Run(config), item, by_epoch(LEARNS, length, repeats=repeats))
    assert run.findings == []
    run.measure(item, accuracy=LEARNS[-1], times=100)  # type: ignore[arg-type]
    assert run.findings == []
    assert run.condition() == "healthy"


def test_the_same_curve_between_its_points_gives_nothing_either() -> None:
    for item in (LOW, FULL):
        run = Run(TASK)
        for first, second in pairwise(LEARNS):
            after(run, item, [first + (second - first) * k / 5 for k in range(5)])
        assert run.findings == []


@pytest.mark.parametrize("repeats", [True, False], ids=["repeated", "given once"])
def test_a_run_that_is_stuck_from_epoch_to_epoch_is_found_as_soon_as_four_values_show_it(repeats: bool) -> None:
    run = after(Run(TASK), LOW, by_epoch(STUCK, 10, repeats=repeats))
    [found] = run.findings
    assert (found.condition, found.step, found.metric) == ("collapsed", 4000, 0.25)
    full = after(Run(TASK), FULL, by_epoch(STUCK, 10, repeats=repeats))
    assert [(found.condition, found.step) for found in full.findings] == [("saturated", 4900)]


def test_how_many_new_values_a_standstill_takes_is_a_setting() -> None:
    config = TASK.model_copy(update={"metric_new_values": 2})
    assert [found.step for found in after(Run(config), LOW, by_epoch(STUCK, 10)).findings] == [2000]


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_metric_that_never_changes_counts_as_standing_still_in_the_end(value: float) -> None:
    run = after(Run(TASK), LOW, [value] * 60)
    [found] = run.findings
    assert (found.condition, found.step) == ("collapsed", 100 * (1 + TASK.metric_constant_after))
    full = after(Run(TASK), FULL, [value] * 60)
    assert [found.condition for found in full.findings] == ["saturated"]


def test_a_metric_that_never_changes_and_is_given_once_an_epoch_counts_as_standing_still_too() -> None:
    run = after(Run(TASK), LOW, by_epoch([0.25] * 6, 10, repeats=False))
    assert [(found.condition, found.step) for found in run.findings] == [("collapsed", 5000)]


def test_a_metric_that_has_learned_and_then_never_changes_stands_still() -> None:
    run = after(Run(TASK), LOW, [*(0.1 + 0.03 * k for k in range(20)), *[0.67] * 60])
    assert [found.condition for found in run.findings] == ["collapsed"]


def test_an_epoch_longer_than_the_wait_for_a_constant_metric_does_not_make_it_one() -> None:
    length = 3 * TASK.metric_constant_after
    run = after(Run(TASK), FULL, by_epoch((0.1, 0.3, 0.5, 0.7), length))
    assert run.findings == []


def test_a_metric_that_is_no_longer_given_is_no_longer_known() -> None:
    gone = [*STUCK[:2], *[None] * 80]
    assert [found.condition for found in after(Run(TASK), LOW, gone).findings] == ["collapsed"]
    assert after(Run(TASK), reading(0.2, 0.9), gone).findings == [], "its decay shows no fault"
    assert after(Run(TASK), FULL, gone).findings == []


def test_a_finding_outlasts_the_metric_that_it_was_made_with() -> None:
    kept = reading(0.2, 0.9)
    run = Run(TASK).measure(kept, accuracy=0.25, times=30)
    assert run.condition() == "collapsed"
    assert run.measure(kept, times=200).condition() == "collapsed"
    assert run.measure(reading(0.4, 0.9), times=10).condition() == "healthy"
    full = Run(TASK).measure(FULL, accuracy=0.25, times=30).measure(FULL, times=200)
    assert full.condition() == "saturated"


@pytest.mark.parametrize("given", [[0.97] * 300, [0.97, *[None] * 300], [0.3, 0.5, 0.97, *[None] * 300]])
def test_a_task_that_was_solved_stays_solved_while_nothing_else_is_heard(given: list[float | None]) -> None:
    for item in (LOW, FULL):
        run = after(Run(TASK), item, given)
        assert run.findings == []
        assert run.condition() == "healthy"


def test_a_metric_of_epochs_that_hovers_around_its_target_counts_as_solved() -> None:
    run = after(Run(TASK), LOW, by_epoch((0.3, 0.96, 0.93, 0.94, 0.93), 10))
    assert run.findings == []
    after(run, LOW, by_epoch((0.94, 0.93, 0.94, 0.93, 0.94), 10))
    assert [found.condition for found in run.findings] == ["collapsed"]


def test_a_metric_with_a_few_possible_values_counts_like_another_one() -> None:
    run = after(Run(TASK), LOW, [(0.125, 0.25, 0.25, 0.125, 0.25)[k % 5] for k in range(30)])
    assert [found.condition for found in run.findings] == ["collapsed"]
    assert run.findings[0].step <= 1700


GIVEN = st.sampled_from([None, 0.2, 0.2, 0.2, 0.25, 0.96])


@given(st.lists(GIVEN, max_size=60), st.integers(0, 60), st.sampled_from([LOW, FULL]))
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    accuracies: list[float | None], stop: int, item: object
) -> None:
    config = TASK.model_copy(update={"warmup_steps": 300, "metric_constant_after": 12})
    whole, first, second = Run(config), Run(config), Run(config)
    after(whole, item, accuracies)
    after(first, item, accuracies[:stop])
    second.step = first.step
    second.tracker.load_state_dict(json.loads(json.dumps(first.tracker.state_dict(), sort_keys=True)))
    after(second, item, accuracies[stop:])
    assert first.findings + second.findings == whole.findings
    assert second.tracker.state_dict() == whole.tracker.state_dict()


def test_a_state_without_the_new_values_is_read_by_its_known_ones() -> None:
    state = after(Run(TASK), LOW, by_epoch(LEARNS, 10)).tracker.state_dict()
    old = {name: item for name, item in state.items() if name != "task"}
    assert set(old) == {"version", "metric", "metrics", "layers"}
    tracker = Tracker(TASK)
    tracker.load_state_dict(old)
    again = tracker.state_dict()
    assert {name: again[name] for name in old} == old
    run = Run(TASK)
    run.tracker, run.step = tracker, 7000
    assert after(run, LOW, by_epoch((0.97,) * 10, 10)).findings == []


def test_new_values_under_another_metric_are_forgotten() -> None:
    state = after(Run(TASK), LOW, STUCK).tracker.state_dict()
    other = Tracker(DiagnosisConfig(metric="loss", metric_mode="min", metric_solved=0.1))
    other.load_state_dict(state)
    assert other.state_dict() == {**Tracker(other.config).state_dict(), "layers": state["layers"]}
