"""Which layers a sample has time for: all have their turn, whatever a clock says."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from ess_monitor.runtime.turns import FILLED, LayerTurns, samples_for_all

NAMES = [f"blocks.{k}" for k in range(12)]


@dataclass(frozen=True)
class Cost:
    """A shape whose cost is proportional to its size."""

    seconds: float
    kind: str = "kind"

    def smaller(self) -> Iterator[Cost]:
        for k in range(1, 6):
            yield replace(self, seconds=self.seconds / 2**k)


def take(turns: LayerTurns, costs: dict[str, Cost], step: int, slowness: float = 1.0) -> dict[str, float]:
    """One sample, judged at once; what it took of each layer, in estimated seconds."""
    taken = {}
    for name in turns.choose(list(costs)):
        fitted = turns.fit(name, costs[name])
        if fitted is not None:
            taken[name] = fitted.seconds
    turns.observe(step, dict.fromkeys(taken, slowness))
    return taken


def test_every_layer_has_its_turn_and_no_sample_passes_the_limit() -> None:
    numbers = random.Random(0)
    for _ in range(50):
        costs = {name: Cost(numbers.choice((0.1, 1.0, 3.0, 8.9))) for name in NAMES}
        turns = LayerTurns(NAMES, 10.0)
        last = dict.fromkeys(NAMES, -1)
        longest_wait = 2 * math.ceil(sum(cost.seconds for cost in costs.values()) / (FILLED * 10.0)) + 1
        for step in range(60):
            taken = take(turns, costs, step)
            assert taken
            assert sum(taken.values()) <= FILLED * 10.0
            last |= dict.fromkeys(taken, step)
            assert min(last.values()) >= step - longest_wait


def test_layers_that_all_fit_are_all_in_every_sample() -> None:
    turns, costs = LayerTurns(NAMES, 10.0), dict.fromkeys(NAMES, Cost(0.1))
    assert [list(take(turns, costs, step)) for step in range(3)] == [NAMES] * 3
    assert samples_for_all(costs, 10.0) == 1


def test_without_a_limit_nothing_is_left_out() -> None:
    assert list(take(LayerTurns(NAMES, None), dict.fromkeys(NAMES, Cost(1e6)), 0)) == NAMES


def test_a_layer_that_alone_takes_too_long_is_measured_in_a_smaller_shape() -> None:
    turns = LayerTurns(["a"], 10.0)
    assert take(turns, {"a": Cost(40.0)}, 0) == {"a": 5.0}
    assert take(turns, {"a": Cost(4000.0)}, 1) == {"a": 125.0}, "the smallest, however long it takes"


def test_the_first_samples_say_by_how_much_the_estimates_are_off() -> None:
    turns, costs = LayerTurns(NAMES, 10.0), dict.fromkeys(NAMES, Cost(1.0))
    assert len(take(turns, costs, 0, slowness=4.0)) == 9
    assert len(take(turns, costs, 1, slowness=4.0)) == 2, "four times as slow, those of the same kind as well"
    turns = LayerTurns(NAMES, 10.0)
    take(turns, costs, 0, slowness=0.5)
    assert len(take(turns, costs, 1)) == 12


@pytest.mark.parametrize("lie", [0.0, -1.0, math.nan, math.inf, -math.inf, 1e300, 1e-300])
def test_a_clock_that_lies_ends_no_layers_turn(lie: float) -> None:
    turns, costs = LayerTurns(NAMES, 10.0), dict.fromkeys(NAMES, Cost(1.0))
    seen: set[str] = set()
    for step in range(12):
        seen |= take(turns, costs, step, slowness=lie).keys()
    assert seen == set(NAMES)
    step = 12
    while len(take(turns, costs, step)) < 9:  # the truth again
        step += 1
        assert step < 12 + 4 * len(NAMES), "a lie is outvoted by the next measurements"


def test_the_plan_follows_from_numbers_that_ranks_and_resumed_runs_have() -> None:
    numbers = random.Random(1)
    costs = {name: Cost(numbers.uniform(0.5, 4.0)) for name in NAMES}
    here, there = LayerTurns(NAMES, 10.0), LayerTurns(NAMES, 10.0)
    for step in range(20):
        assert here.choose(NAMES) == there.choose(NAMES)
        slowness = numbers.uniform(0.8, 1.3)
        assert take(here, costs, step, slowness) == take(there, costs, step, slowness)
    resumed = LayerTurns(NAMES, 10.0)
    resumed.load_state_dict(json.loads(json.dumps(here.state_dict())))
    for step in range(20, 40):
        assert take(resumed, costs, step) == take(here, costs, step)


def test_noise_of_a_clock_changes_no_plan() -> None:
    numbers = random.Random(2)
    costs = {name: Cost(numbers.uniform(0.5, 4.0)) for name in NAMES}
    plans = []
    for seed in (3, 4):
        noise = random.Random(seed)
        turns = LayerTurns(NAMES, 10.0)
        plans.append([list(take(turns, costs, step, 1.05 * noise.uniform(0.97, 1.03))) for step in range(20)])
    assert plans[0] == plans[1]


def test_layers_on_which_something_is_to_be_decided_come_first_in_half_of_the_time() -> None:
    turns, costs = LayerTurns(NAMES, 10.0), dict.fromkeys(NAMES, Cost(1.0))
    take(turns, costs, 0)
    turns.prefer(NAMES[:1])
    assert all(NAMES[0] in take(turns, costs, step) for step in range(1, 5))
    turns.prefer(NAMES[:10])
    seen = [take(turns, costs, step) for step in range(5, 10)]
    assert set().union(*seen) == set(NAMES), "the others are not left out for ever"


def test_a_sample_under_way_is_followed_by_other_layers() -> None:
    turns, costs = LayerTurns(NAMES, 10.0), dict.fromkeys(NAMES, Cost(1.5))
    first = [name for name in turns.choose(NAMES) if turns.fit(name, costs[name])]
    turns.begin(0, first)
    second = [name for name in turns.choose(NAMES) if turns.fit(name, costs[name])]
    assert (first, second) == (NAMES[:6], NAMES[6:])
    turns.end(0)
    assert turns.choose(NAMES) == NAMES[:6], "it was lost, and they have had no turn"


def test_a_layer_that_missed_samples_goes_on_with_the_heads_that_are_next() -> None:
    turns = LayerTurns(["a", "b"], 10.0)
    turns.defer(["b"])
    turns.defer(["b"])
    assert [turns.turn_of(name, 5) for name in ("a", "b")] == [5, 3]
