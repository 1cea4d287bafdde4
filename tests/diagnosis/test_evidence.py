"""A collapse is called on evidence: when it is asked for, what it decides, how long it holds."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from ess_monitor.diagnosis import DiagnosisConfig, Tracker
from ess_monitor.records import Evidence, Finding, Reading
from tests.diagnosis.helpers import TASK, reading

LAYER = "mixer.1"
LOW = reading(0.15, 0.5)
FULL = reading(0.7, 0.98)
BLIND = DiagnosisConfig(warmup_steps=0)


def evidence(outcome: Any, basis: Any = "loss") -> Evidence:
    numbers = {"base": 2.0 if basis == "loss" else None, "m50": 0.1, "m90": 0.2, "cut": 0.3}
    return Evidence(step=0, layer=LAYER, basis=basis, batches=8, outcome=outcome, reason="seen", **numbers)


class Examined:
    """A run whose suspects are answered at the next measurement."""

    def __init__(self, config: DiagnosisConfig = BLIND, obstacle: str = "", recheck: int = 20) -> None:
        self.tracker = Tracker(config, examined={LAYER: obstacle}, recheck_measurements=recheck)
        self.findings: list[Finding] = []
        self.asked: list[int] = []
        self.step = 0

    def measure(self, seen: Reading, answer: Evidence | str | None = None, accuracy: float | None = None) -> Examined:
        self.step += 100
        found = {LAYER: answer} if answer is not None and self.tracker.suspects else {}
        metrics = {} if accuracy is None else {"accuracy": accuracy + 1e-9 * self.step}  # computed anew
        self.findings += self.tracker.observe([seen], metrics, self.step, found)
        if self.tracker.suspects:
            self.asked.append(self.step)
        return self

    def times(self, count: int, *arguments: Any, **named: Any) -> Examined:
        for _ in range(count):
            self.measure(*arguments, **named)
        return self

    @property
    def condition(self) -> str:
        return self.tracker.conditions[LAYER]


def test_evidence_is_asked_for_one_measurement_before_the_streak_is_complete() -> None:
    run = Examined().times(3, LOW)
    assert run.asked == []
    run.measure(LOW)
    assert run.asked == [400]
    assert run.condition == "unknown"
    run.measure(LOW, evidence("loud"))
    assert run.condition == "collapsed"
    [finding] = run.findings
    assert (finding.step, finding.evidence.outcome) == (500, "loud")
    assert "seen" in finding.reason


@pytest.mark.parametrize(
    ("outcome", "condition", "found"),
    [
        ("loud", "collapsed", ["collapsed"]),
        ("silent", "unused", ["unused"]),
        ("by_choice", "forgets_by_choice", ["forgets_by_choice"]),
        ("unclear", "unknown", []),
    ],
)
@pytest.mark.parametrize("basis", ["loss", "kl"])
def test_the_outcome_decides(outcome: str, condition: str, found: list[str], basis: str) -> None:
    run = Examined().times(8, LOW, evidence(outcome, basis))
    assert run.condition == condition
    assert [finding.condition for finding in run.findings] == found
    assert all(finding.evidence == evidence(outcome, basis) for finding in run.findings)


@pytest.mark.parametrize(
    ("accuracy", "condition", "advice"),
    [(None, "unused", "give the diagnosis a task metric"), (0.5, "unused", "on trial"), (0.95, "healthy", "")],
    ids=["none", "low", "high"],
)
def test_a_layer_that_nothing_reaches_is_unused_and_not_collapsed(
    accuracy: float | None, condition: str, advice: str
) -> None:
    """A task that needs no past at all, as a Markov chain of order 1, leaves a layer in the same state, also where its
    target is out of reach."""
    run = Examined(TASK).times(40, LOW, evidence("silent"), accuracy)
    assert run.condition == condition
    assert [finding.condition for finding in run.findings] == ([] if condition == "healthy" else ["unused"])
    assert all(advice in finding.advice for finding in run.findings)


def test_an_unused_layer_is_asked_about_again_and_ends_as_what_is_found() -> None:
    run = Examined(TASK).times(30, LOW, evidence("silent"), 0.5).times(60, LOW, evidence("loud"), 0.5)
    assert [finding.condition for finding in run.findings] == ["unused", "collapsed"]
    run = Examined(TASK).times(30, LOW, evidence("silent"), 0.5).times(8, FULL, None, 0.5)
    assert [finding.condition for finding in run.findings] == ["unused", "healthy"]


@pytest.mark.parametrize(("accuracy", "solved"), [(None, None), (0.5, False), (0.95, True)])
def test_the_task_is_solved_unsolved_or_unknown(accuracy: float | None, solved: bool | None) -> None:
    assert Examined(TASK).times(3, LOW, None, accuracy).tracker.task_solved is solved


def test_nothing_is_called_while_the_evidence_is_under_way() -> None:
    run = Examined().times(30, LOW)
    assert run.condition == "unknown"
    assert run.findings == []
    assert run.asked[-1] == 3000
    assert run.measure(LOW, evidence("loud")).condition == "collapsed"


def test_a_layer_that_recovers_is_no_suspect_any_more() -> None:
    run = Examined().times(4, LOW).measure(FULL)
    assert run.tracker.suspects == ()


def test_a_choice_is_asked_about_again_and_can_turn_into_a_collapse() -> None:
    run = Examined(recheck=20).times(5, LOW, evidence("by_choice"))
    asked = len(run.asked)
    run.times(20, LOW, evidence("loud"))
    assert len(run.asked) == asked, "what is known is not asked again at once"
    assert run.condition == "forgets_by_choice"
    run.times(8, LOW, evidence("loud"))
    assert run.condition == "collapsed"
    assert [finding.condition for finding in run.findings] == ["forgets_by_choice", "collapsed"]


def test_a_choice_ends_where_the_memory_is_used_again() -> None:
    run = Examined().times(6, LOW, evidence("by_choice")).times(8, FULL)
    assert [(f.previous, f.condition) for f in run.findings][-1] == ("forgets_by_choice", "healthy")


def test_a_collapse_is_not_called_on_an_old_suspicion() -> None:
    run = Examined().times(4, LOW).measure(FULL, evidence("loud"))
    run.times(6, FULL).times(6, LOW)
    assert run.condition != "collapsed"
    assert run.asked[-1] == run.step


@pytest.mark.parametrize("answer", ["no batch", None])
def test_without_evidence_and_without_a_metric_nothing_is_said_but_in_the_log(
    answer: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    run = Examined(obstacle="" if answer else "its A has no power")
    with caplog.at_level(logging.WARNING, logger="ess_monitor"):
        run.times(12, LOW, answer)
    assert run.condition == "unknown"
    assert run.findings == []
    [record] = [r for r in caplog.records if "might have collapsed" in r.getMessage()]
    assert (answer or "its A has no power") in record.getMessage()


def test_without_evidence_an_unsolved_metric_must_do() -> None:
    run = Examined(TASK.model_copy(update={"warmup_steps": 0}), obstacle="its A has no power")
    run.times(20, LOW, accuracy=0.25)
    assert run.condition == "collapsed"
    [finding] = run.findings
    assert finding.evidence is None
    assert "its A has no power" in finding.reason


def test_evidence_counts_with_a_metric_too() -> None:
    config = TASK.model_copy(update={"warmup_steps": 0})
    run = Examined(config).times(20, LOW, evidence("by_choice"), accuracy=0.25)
    assert run.condition == "forgets_by_choice", "a target that cannot be reached must do no harm"


def test_a_layer_without_decay_needs_no_evidence() -> None:
    run = Examined(TASK.model_copy(update={"warmup_steps": 0}))
    run.times(20, reading(0.15, None), accuracy=0.25)
    assert run.condition == "collapsed"
    assert run.asked == []


def test_a_resumed_run_goes_on_in_the_middle_of_an_examination() -> None:
    whole, first = Examined(), Examined()
    whole.times(4, LOW).times(4, LOW, evidence("by_choice"))
    first.times(4, LOW)
    second = Examined()
    second.tracker.load_state_dict(json.loads(json.dumps(first.tracker.state_dict())))
    second.step = first.step
    assert second.tracker.suspects == (LAYER,)
    second.times(4, LOW, evidence("by_choice"))
    assert second.tracker.state_dict() == whole.tracker.state_dict()
    assert second.findings == whole.findings


def test_evidence_that_comes_while_a_layer_waits_for_its_turn_counts_at_its_next_reading() -> None:
    waits = reading(0.15, 0.5, status="deferred")
    run = Examined().times(4, LOW)
    assert run.asked == [400]
    run.measure(waits, evidence("loud"))
    assert run.condition == "unknown"
    run.times(30, waits)
    assert run.asked == [400], "it is not asked for once more"
    run.measure(LOW)
    assert run.condition == "collapsed"
    assert run.findings[0].evidence.outcome == "loud"


def test_a_layer_that_is_measured_in_every_third_sample_is_judged_by_its_own_readings() -> None:
    waits = reading(0.15, 0.5, status="deferred")
    often, seldom = Examined(), Examined()
    for _ in range(8):
        often.measure(LOW, evidence("loud"))
        seldom.measure(LOW, evidence("loud")).measure(waits, evidence("loud")).measure(waits)
    assert [finding.step for finding in often.findings] == [500]
    assert [finding.step for finding in seldom.findings] == [1300]
