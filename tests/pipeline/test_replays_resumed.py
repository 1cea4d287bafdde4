"""A run that is saved while batches are run again, and a treatment on trial, against the uninterrupted one."""

from __future__ import annotations

import io
from typing import Any

import pytest

from tests.pipeline.replaying import ALL_COLLAPSED, Loop, Replays, bits, by_loss, by_outputs, settings_of

STEPS = 36
"""Judged are steps 2, 10, 18, 26 and 34; the treatment begins at 10."""


def story(loop: Loop) -> list[tuple[Any, ...]]:
    """All that was found and done, and on what it rests."""
    told: list[tuple[Any, ...]] = [(f.step, f.layer, f.condition, f.reason, f.evidence) for f in loop.monitor.findings]
    told += [(a.step, a.layer, a.action, a.outcome, a.strength, a.message) for a in loop.monitor.actions]
    return sorted_story(told)


def sorted_story(told: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return sorted(told, key=lambda entry: (entry[0], *map(str, entry[1:])))


def states_without_times(loop: Loop) -> dict[str, Any]:
    """What the next checkpoint would hold, without what a clock has measured."""
    state = loop.monitor.state_dict()
    return {name: state[name] for name in ("step", "judge_at", "evidence", "autopilot", "diagnosis", "replays", "turn")}


CASES: dict[str, tuple[str, Replays, dict[str, Any]]] = {
    "trial": ("wla", by_loss, {}),
    "alpha": ("gla_s6", by_loss, {}),
    "given up": ("wla", by_loss, {"checks": (4, 13), "silent_patience_steps": 10}),
    "harm": ("wla", by_loss, {"checks": (4, 13), "harm_ratio": 0.0, "noise": 0.0}),
    "outputs": ("wla", by_outputs, {}),
}


def loop_of(name: str) -> Loop:
    featurizer, replays, probation = CASES[name]
    probation = {"checks": (4, 13), "harm_ratio": 1e3, "gain_ratio": 1e3, **probation}
    settings = settings_of("auto", evidence={**ALL_COLLAPSED, "batches": 2}, probation=probation)
    return Loop(settings, replays, featurizer)


@pytest.fixture(scope="module")
def wholes() -> dict[str, Loop]:
    found = {}
    for name in CASES:
        found[name] = loop_of(name).run(STEPS)
        found[name].monitor.close()
    return found


SAVED_AT = {
    "trial": (1, 2, 3, 4, 9, 10, 12, 15, 16, 17, 18, 20, 25, 27),
    "given up": (12, 16, 20, 25),
    "alpha": (3, 12, 15, 17, 20, 29),
    "harm": (3, 12, 15, 17, 20, 29),
    "outputs": (3, 12),
}


@pytest.fixture(scope="module")
def saved() -> dict[tuple[str, int], tuple[io.BytesIO, list[tuple[Any, ...]]]]:
    """What was saved at each step, and what had been told until then; saved one after the other in one run."""
    found = {}
    for name, steps in SAVED_AT.items():
        first = loop_of(name)
        for at in steps:
            found[name, at] = first.run(at - first.step).save(), story(first)
        first.monitor.close()
    return found


@pytest.mark.parametrize(("name", "at"), [(name, at) for name, steps in SAVED_AT.items() for at in steps])
def test_a_run_that_was_saved_at_any_step_goes_on_bit_by_bit(
    name: str, at: int, wholes: dict[str, Loop], saved: dict[tuple[str, int], Any]
) -> None:
    whole, (state, told) = wholes[name], saved[name, at]
    rest = loop_of(name).load(state).run(STEPS - at)
    assert sorted_story([*told, *story(rest)]) == story(whole)
    assert bits(rest.training()) == bits(whole.training())
    assert bits(states_without_times(rest)) == bits(states_without_times(whole))
    rest.monitor.close()
