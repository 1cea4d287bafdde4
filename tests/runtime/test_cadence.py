from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ess_monitor.runtime import Cadence


def run(cadence: Cadence, steps: int, step_seconds: float, sample_cost: float) -> list[int]:
    sampled = []
    for step in range(steps):
        if cadence.due(step):
            sampled.append(step)
            cadence.sampled(step)
            cadence.spent(sample_cost)
        cadence.stepped(step_seconds)
    return sampled


def test_a_cheap_sample_is_taken_every_n_steps_from_the_first() -> None:
    assert run(Cadence(10, 0.01), 35, step_seconds=1.0, sample_cost=0.001) == [0, 10, 20, 30]


def test_a_sample_that_costs_too_much_is_taken_less_often() -> None:
    sampled = run(Cadence(10, 0.01), 1000, step_seconds=0.1, sample_cost=0.2)
    assert sampled == [
        0,
        10,
        210,
        410,
        610,
        810,
    ]  # 0.2 s of cost at 1 % of 0.1 s: every 200 steps; step 0 has no step time


@given(
    every=st.integers(1, 200),
    budget=st.floats(1e-3, 0.5),
    step_seconds=st.floats(1e-3, 10),
    cost=st.floats(1e-4, 10),
)
def test_the_cost_stays_within_the_budget(every: int, budget: float, step_seconds: float, cost: float) -> None:
    cadence = Cadence(every, budget)
    steps = 3000
    sampled = run(cadence, steps, step_seconds, cost)
    late = [s for s in sampled if s > 0]
    allowed = 2 + steps * step_seconds * budget / cost  # the first two samples are taken before the cost is known
    assert len(late) <= max(allowed, 2)
    assert all(b - a >= every for a, b in itertools.pairwise(sampled))


def test_a_pause_between_steps_does_not_count_as_step_time() -> None:
    cadence = Cadence(1, 0.01)
    for seconds in [0.1] * 20 + [600.0] + [0.1] * 20:
        cadence.stepped(seconds)
    cadence.sampled(41)
    cadence.spent(0.1)
    assert cadence.interval_steps == pytest.approx(100, abs=1)


def test_the_measured_share_is_cost_over_time() -> None:
    cadence = Cadence(1, 0.5)
    cadence.stepped(8.0)
    cadence.spent(2.0)
    assert cadence.overhead_ratio == 0.25
    assert Cadence(1, 0.5).overhead_ratio == 0.0


def test_a_resumed_cadence_samples_the_same_steps() -> None:
    whole = Cadence(10, 0.01)
    first = run(whole, 500, 0.1, 0.02)
    half = Cadence(10, 0.01)
    run(half, 250, 0.1, 0.02)
    resumed = Cadence(10, 0.01)
    resumed.load_state_dict(half.state_dict())
    second = []
    for step in range(250, 500):
        if resumed.due(step):
            second.append(step)
            resumed.sampled(step)
            resumed.spent(0.02)
        resumed.stepped(0.1)
    assert second == [s for s in first if s >= 250]


def test_without_a_budget_the_interval_is_never_stretched() -> None:
    assert run(Cadence(10, None), 35, step_seconds=0.001, sample_cost=100.0) == [0, 10, 20, 30]


def test_a_cost_that_came_once_doubles_the_interval_until_it_is_made_up_for() -> None:
    cadence = Cadence(10, 0.01)
    run(cadence, 30, step_seconds=0.1, sample_cost=0.02)  # 0.02 s at 1 % of 0.1 s: every 20 steps
    cadence.spent(0.1, once=True)
    sampled = [step + 30 for step in run_on(cadence, 30, 430)]
    gaps = [b - a for a, b in itertools.pairwise(sampled)]
    # Five samples' cost. The interval under way and each of the longer ones make up for one.
    assert gaps[:4] == [40] * 4
    assert set(gaps[4:]) == {20}
    assert cadence.cost_seconds <= 0.01 * cadence.train_seconds + 3 * 0.02


def run_on(cadence: Cadence, first: int, last: int) -> list[int]:
    sampled = []
    for step in range(first, last):
        if cadence.due(step):
            sampled.append(step - first)
            cadence.sampled(step)
            cadence.spent(0.02)
        cadence.stepped(0.1)
    return sampled


def test_a_cost_that_came_once_survives_a_resume() -> None:
    half, whole = Cadence(10, 0.01), Cadence(10, 0.01)
    for cadence in (half, whole):
        run(cadence, 30, step_seconds=0.1, sample_cost=0.02)
        cadence.spent(0.1, once=True)
    resumed = Cadence(10, 0.01)
    resumed.load_state_dict(half.state_dict())
    assert run_on(resumed, 30, 430) == run_on(whole, 30, 430)


def test_slack_in_the_budget_makes_up_for_a_cost_without_a_longer_interval() -> None:
    cadence = Cadence(100, 0.01)
    run(cadence, 150, step_seconds=1.0, sample_cost=0.02)
    cadence.spent(0.5, once=True)
    assert cadence.interval_steps == 100


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize(
    ("saved", "now", "next_step"),
    [
        ((1000, None), (5, None), 5),
        ((5, None), (1000, None), 1000),
        ((1000, 0.01), (5, 0.01), 50),  # 0.5 s at 1 % of 1 s: the budget asks for 50
        ((5, 0.01), (5, 0.1), 5),
        ((5, 0.01), (5, 0.001), 500),
        ((5, 0.01), (5, None), 5),
        ((5, 0.01), (80, 0.01), 80),
    ],
)
def test_a_resumed_cadence_has_the_new_settings(saved: tuple, now: tuple, next_step: int, locked: bool) -> None:
    first, second = Cadence(*saved, locked=locked), Cadence(*now, locked=locked)
    for _ in range(3):
        first.stepped(1.0)
    first.sampled(0)
    first.spent(0.5)
    if locked:  # what has been agreed on
        first.resume(first.wanted_steps)
    second.load_state_dict(first.state_dict())
    if locked and (saved, now) == ((1000, 0.01), (5, 0.01)):
        next_step = 5  # no rank knows what the others' costs ask for: all ask the first sample
    assert second.next_step == next_step


def test_ranks_with_costs_of_their_own_resume_at_the_same_step_under_new_settings() -> None:
    steps = set()
    for cost in (0.2, 0.9):
        first, second = Cadence(5, 0.01, locked=True), Cadence(10, 0.02, locked=True)
        first.stepped(1.0)
        first.sampled(0)
        first.spent(cost)
        first.resume(60)  # agreed by all
        second.load_state_dict(first.state_dict())
        steps.add(second.next_step)
    assert steps == {30}
