"""A saturation is called on evidence: when it is asked for, what it decides, and what the readings alone must show."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ess_monitor.diagnosis import DiagnosisConfig, Tracker
from ess_monitor.diagnosis.utilization import full_state_utilization
from ess_monitor.records import Finding, Reading, StateEvidence

LAYER = "mixer.1"
TASK = DiagnosisConfig(warmup_steps=0, metric="accuracy", metric_solved=0.9)


def full(use: float = 1.0, end: float | None = 0.5) -> Reading:
    return Reading(
        step=0,
        layer=LAYER,
        status="ok",
        length=64,
        state_capacity=16,
        attainable_size=16,
        effective_size=16 * use,
        utilization_ratio=use,
        retention_ratio=1.0,
        spectrum_end_ratio=end,
    )


def answer(outcome: Any) -> StateEvidence:
    numbers = {"base": 2.0, "quarter": 0.5, "half": 1.0, "whole": 2.0}
    return StateEvidence(step=0, layer=LAYER, basis="loss", batches=8, outcome=outcome, reason="seen", **numbers)


class Examined:
    """A run whose full suspects are answered at the next measurement."""

    def __init__(self, obstacle: str | None = "", config: DiagnosisConfig = TASK) -> None:
        states = None if obstacle is None else {LAYER: obstacle}
        self.tracker = Tracker(config, examined_states=states, recheck_measurements=20)
        self.findings: list[Finding] = []
        self.asked: list[int] = []
        self.count = 0

    def measure(
        self, seen: Reading | None = None, given: StateEvidence | str | None = None, accuracy: float = 0.5
    ) -> Examined:
        self.count += 1
        found = {LAYER: given} if given is not None and self.tracker.full_suspects else {}
        metrics = {"accuracy": accuracy + 1e-9 * self.count}  # computed anew
        self.findings += self.tracker.observe([full() if seen is None else seen], metrics, self.count, found)
        if self.tracker.full_suspects:
            self.asked.append(self.count)
        return self

    def times(self, count: int, *arguments: Any, **named: Any) -> Examined:
        for _ in range(count):
            self.measure(*arguments, **named)
        return self

    @property
    def condition(self) -> str:
        return self.tracker.conditions[LAYER]


def test_evidence_is_asked_for_one_measurement_before_the_patience_is_over() -> None:
    run = Examined().times(3)
    assert run.asked == []
    run.measure()
    assert run.asked == [4]
    assert run.condition == "unknown"
    run.measure(given=answer("needed"))
    assert run.condition == "saturated"
    [finding] = run.findings
    assert (finding.step, finding.evidence) == (5, answer("needed"))
    assert "seen" in finding.reason
    assert run.tracker.state_evidence == {LAYER: answer("needed")}


def test_a_state_that_the_loss_does_not_need_is_healthy_and_asked_about_again() -> None:
    run = Examined().times(10, given=answer("spare"))
    assert (run.condition, run.findings, run.asked) == ("healthy", [], [4])
    run.times(20, given=answer("needed"))
    assert run.condition == "saturated"
    assert run.asked[1] == 5 + 21


def test_nothing_is_called_while_the_evidence_is_under_way() -> None:
    run = Examined().times(30)
    assert (run.condition, run.findings) == ("healthy", [])
    assert run.measure(given=answer("needed")).condition == "saturated"


def test_a_trend_upwards_forbids_the_finding_and_does_not_restart_the_patience() -> None:
    run = Examined()
    for accuracy in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        run.measure(given=answer("needed"), accuracy=accuracy)
    assert run.asked == []
    run.times(9, given=answer("needed"), accuracy=0.7)
    [finding] = run.findings
    assert finding.step == run.asked[-1] + 1


def test_a_state_that_is_no_longer_full_starts_anew() -> None:
    run = Examined().times(4).measure(full(0.5)).times(3, given=answer("needed"))
    assert run.condition != "saturated"
    assert run.asked == [4]
    assert run.tracker.full_suspects == ()


@pytest.mark.parametrize(("use", "found"), [(0.93, True), (0.91, False)])
def test_with_evidence_a_state_is_full_from_a_lower_utilization_on(use: float, found: bool) -> None:
    assert (Examined().times(8, full(use), answer("needed")).condition == "saturated") == found
    assert Examined(obstacle=None).times(40, full(use)).condition != "saturated"


@pytest.mark.parametrize(("end", "found"), [(0.5, True), (0.02, True), (0.019, False), (None, True)])
@pytest.mark.parametrize("obstacle", ["", "no argument holds its state", None])
def test_the_spectrum_must_end_high_with_evidence_and_without(
    end: float | None, found: bool, obstacle: str | None
) -> None:
    run = Examined(obstacle).times(40, full(1.0, end), answer("needed"))
    assert (run.condition == "saturated") == found
    assert len(run.findings) == found


def test_without_evidence_the_readings_must_show_it_for_longer_and_the_reason_says_so() -> None:
    run = Examined("no argument holds its state")
    while not run.findings:
        run.measure()
    [finding] = run.findings
    assert finding.step == TASK.saturated_patience + TASK.metric_new_values - 1, "a trend needs as many values"
    assert finding.evidence is None
    assert "without evidence (no argument holds its state)" in finding.reason
    assert run.asked == []


def test_where_no_batch_could_be_run_again_the_readings_decide_until_it_is_asked_for_anew() -> None:
    run = Examined().times(40, given="no batch")
    [finding] = run.findings
    assert "without evidence (no batch)" in finding.reason
    assert finding.evidence is None


def test_a_state_is_restored_with_what_is_under_way() -> None:
    run = Examined().times(4)
    other = Examined()
    other.tracker.load_state_dict(json.loads(json.dumps(run.tracker.state_dict())))
    other.count = 4
    assert other.tracker.full_suspects == (LAYER,)
    assert other.measure(given=answer("needed")).condition == "saturated"
    again = Examined()
    again.tracker.load_state_dict(json.loads(json.dumps(other.tracker.state_dict())))
    assert again.tracker.state_evidence == {LAYER: answer("needed")}


def test_a_solved_task_ends_it() -> None:
    run = Examined().times(5, given=answer("needed")).times(5, accuracy=0.95)
    assert [(f.previous, f.condition) for f in run.findings][-1] == ("saturated", "healthy")


def test_ranks_that_decide_together_use_only_what_they_have_exchanged() -> None:
    """Sizes at single positions are each rank's own."""
    own = Reading(
        step=0,
        layer=LAYER,
        status="ok",
        length=32,
        positions=(4, 16, 28),
        state_capacity=8,
        attainable_size=8.0,
        effective_size=6.0,
        per_position=(4.0, 8.0, 4.0),
    )
    assert full_state_utilization(own) == 1.0
    agreed = own.model_copy(update={"utilization_min_ratio": 0.5})
    assert full_state_utilization(agreed) == 0.75
    assert full_state_utilization(agreed.model_copy(update={"per_position": ()})) == 0.75
