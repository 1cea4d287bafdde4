"""Settings that are new at a resume hold from the resume on, whatever the state was saved under."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ess_monitor import MonitorConfig
from tests.pipeline.replaying import ALL_COLLAPSED, FULL, LAST, Loop, by_loss, settings_of

NEVER: dict[str, Any] = {"cut_ratio": 0.99, "silent_ratio": 1e-9, "m50_share": 1e-9, "far_m50_share": 1e-9}
"""Settings `evidence` under which nothing that is found supports a collapse."""
EARLY: dict[str, Any] = {"collapsed_below": 0.01, "collapsed_recovers_above": 0.02, "starved_below": 0.03}
TOLERANT: dict[str, Any] = {**EARLY, "starved_recovers_above": 0.04}


class Counted:
    """Gives the replay of a batch, and counts how often it runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, loop: Loop, tokens: Any) -> Callable[[], Any]:
        replay = by_loss(loop, tokens)

        def counted() -> Any:
            self.runs += 1
            return replay()

        return counted


def resumed(saved: MonitorConfig, at: int, present: MonitorConfig, steps: int) -> tuple[Loop, int]:
    """A run that is saved at a step, and goes on under other settings; and how often a batch was run again since."""
    first = Loop(saved).run(at)
    state = first.save()
    assert first.monitor is not None
    first.monitor.close()
    replays = Counted()
    second = Loop(present, replays).load(state).run(steps)
    assert second.monitor is not None
    second.monitor.close()
    return second, replays.runs


def conditions(loop: Loop) -> dict[str, str]:
    assert loop.monitor is not None
    return dict(loop.monitor.conditions)


def found(loop: Loop) -> list[tuple[int, str]]:
    assert loop.monitor is not None
    return [(finding.step, finding.condition) for finding in loop.monitor.findings]


ADVISE = settings_of()
EXAMINED = settings_of(evidence=ALL_COLLAPSED)
"""Saved at step 4: a suspect since step 2, of which the batches of the steps 3 to 5 are run again."""
AUTO = settings_of("auto", evidence=ALL_COLLAPSED)

CASES: dict[str, tuple[MonitorConfig, int, MonitorConfig, int, Callable[[Loop, int], Any], Any]] = {
    # Nothing is run again where it is switched off, although a layer was under examination.
    "mode off": (EXAMINED, 4, settings_of("off"), 30, lambda loop, runs: runs, 0),
    "no evidence": (EXAMINED, 4, settings_of(evidence={"enabled": False}), 30, lambda loop, runs: runs, 0),
    "no evidence is needed": (
        EXAMINED, 4, settings_of(evidence={"enabled": False}), 12, lambda loop, runs: found(loop), [(8, "collapsed")],
    ),
    "more batches": (
        EXAMINED, 4, settings_of(evidence={**ALL_COLLAPSED, "batches": 5}), 24,
        lambda loop, runs: loop.evidence[0].batches, 5,
    ),
    "fewer batches": (
        settings_of(evidence={**ALL_COLLAPSED, "batches": 5}), 4, EXAMINED, 24,
        lambda loop, runs: loop.evidence[0].batches, 3,
    ),
    # What was found under other thresholds is no answer: the layer is examined again.
    "evidence that supports": (
        settings_of(evidence=NEVER), 12, EXAMINED, 24, lambda loop, runs: (conditions(loop)[LAST], runs > 0),
        ("unused", True),
    ),
    "evidence that does not": (
        EXAMINED, 7, settings_of(evidence=NEVER), 24, lambda loop, runs: conditions(loop)[LAST], "unknown",
    ),
    "the same evidence": (EXAMINED, 12, EXAMINED, 8, lambda loop, runs: runs, 0),
    "thresholds": (
        EXAMINED, 12, settings_of(evidence=ALL_COLLAPSED, diagnosis=TOLERANT), 8,
        lambda loop, runs: conditions(loop)[LAST] != "unused", True,
    ),
    "warm-up": (EXAMINED, 4, settings_of(evidence=ALL_COLLAPSED, diagnosis={"warmup_steps": 99}), 30,
        lambda loop, runs: found(loop), []),
    "full": (
        EXAMINED, 4, settings_of(evidence={"state_ratio": 1e-9}, diagnosis=FULL), 40,
        lambda loop, runs: {condition for _, condition in found(loop)} <= {"saturated"}, True,
    ),
    # A treatment under way goes on without its probation, and does not end for it.
    "no probation": (
        settings_of("auto", evidence=ALL_COLLAPSED, probation={"checks": (4,), "silent_patience_steps": 20,
        "patience_steps": 20}), 12,
        settings_of("auto", evidence={"enabled": False}), 24,
        lambda loop, runs: (runs, [t.layer.name for t in loop.monitor._results.autopilot.active]), (0, [LAST]),
    ),
    "no ladder": (
        AUTO, 12, settings_of("auto", evidence=ALL_COLLAPSED, strengths=(0.125,)), 4,
        lambda loop, runs: [t.strength for t in loop.monitor._results.autopilot.active], [0.125],
    ),
    "no budget": (
        settings_of(evidence=ALL_COLLAPSED), 12, settings_of("auto", evidence=ALL_COLLAPSED, budget=0), 20,
        lambda loop, runs: {action.outcome for action in loop.monitor.actions}, {"rejected"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_set_at_a_resume_holds_from_there_on(case: str) -> None:
    saved, at, present, steps, ask, expected = CASES[case]
    assert ask(*resumed(saved, at, present, steps)) == expected
