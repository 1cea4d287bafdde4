"""Faults of the regularizer that mode auto attaches."""

from __future__ import annotations

import itertools
from typing import Any

import ess_monitor.interventions.identity_pull as regularizer
from ess_monitor.diagnosis import Tracker
from ess_monitor.interventions import Autopilot
from tests.faults.harness import Injection, Outcome, case, watch


@case("mode auto: the regularizer's gradient raises in every backward pass")
def regularizer_fails_in_backward(injection: Injection) -> Outcome:
    return _failing(injection, "_penalty_gradients")


@case("mode auto: the regularizer raises in every forward pass")
def regularizer_fails_in_forward(injection: Injection) -> Outcome:
    return _failing(injection, "_with_gradient")


def _failing(injection: Injection, name: str) -> Outcome:
    calls = itertools.count()

    def explode(*args: Any, **kwargs: Any) -> Any:
        next(calls)
        raise RuntimeError("injected")

    injection.patch.setattr(regularizer, name, explode)
    injection.patch.setattr(Tracker, "conditions", {"blocks.0.mixer": "healthy", "blocks.1.mixer": "collapsed"})
    injection.patch.setattr(Autopilot, "_to_blame", lambda self, reading: True)
    autopilot = {"mode": "auto", "lag_steps": 1, "cooldown_steps": 100}
    run = watch(settings={"autopilot": autopilot, "evidence": {"enabled": False}})
    actions = [(action.action, action.outcome) for m in run.sink.measurements for action in m.actions]
    return Outcome(
        run.unchanged,
        {
            "it was asked": next(calls) > 0,
            "applied, then failed": actions[:2] == [("pull_to_identity", "applied"), ("pull_to_identity", "failed")],
            "part_failures_total": run.snapshot.health.part_failures_total["intervention"] == 1,
            "log": injection.said("intervention failed (the regularizer on blocks.1.mixer: RuntimeError: injected")
            == 1,
        },
    )
