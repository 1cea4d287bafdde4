"""Tests of the alerts on the autopilot."""

from __future__ import annotations

from ess_monitor.alerts.cases.base import GRID, AlertCase, Firing, held, on_grid, run_labels, series, target
from ess_monitor.alerts.config import AlertsConfig
from ess_monitor.alerts.rules.base import duration


def intervention_cases(config: AlertsConfig) -> tuple[AlertCase, ...]:
    """Every alert of the group, silent, firing and resolved."""
    return (
        _failing(config),
        _rolled_back(config),
        _flapping(config),
        _ineffective(config),
        _rescued(config),
        _long_before(config),
    )


def _actions(config: AlertsConfig, outcome: str, rank: int = 0) -> str:
    labels = {**target(config, rank), "action": "pull_to_identity", "outcome": outcome}
    return series("ess_monitor_interventions_total", labels)


def _collapsed(config: AlertsConfig) -> str:
    labels = {**target(config), "layer": "blocks.1.mixer", "condition": "collapsed"}
    return series("ess_monitor_layer_condition", labels)


def _failing(config: AlertsConfig) -> AlertCase:
    firing = Firing(
        {**run_labels(config), "action": "pull_to_identity", "outcome": "failed"},
        "An intervention in run wla-7 has failed",
        "Within the last 15 minutes pull_to_identity did not bring its layer back, or could not be carried on. A "
        "person has to look: the event log names the layer and the reason.",
    )
    happened = 1200
    return AlertCase(
        "both ranks count the same failure, which is one alert; an applied action is none",
        "InterventionFailing",
        "warning",
        {
            _actions(config, "failed", 0): held((0, happened), (1, 1800)),
            _actions(config, "failed", 1): held((0, happened), (1, 1800)),
            _actions(config, "applied", 0): held((0, 600), (1, 2400)),
        },
        {
            900: (),
            happened - GRID: (),
            happened: (firing,),
            happened + 900 - GRID: (firing,),
            happened + 900: (),
        },
    )


def _rolled_back(config: AlertsConfig) -> AlertCase:
    firing = Firing(
        {**run_labels(config), "action": "pull_to_identity", "outcome": "rolled_back"},
        "An intervention in run wla-7 has been rolled back",
        "Within the last 15 minutes pull_to_identity was undone, as the loss broke. A person has to look: the event "
        "log names the layer and the reason.",
    )
    happened = 1200
    return AlertCase(
        "the loss breaks under a treatment, which is undone; what else may happen to it is no news",
        "InterventionFailing",
        "warning",
        {
            _actions(config, "rolled_back"): held((0, happened), (1, 1800)),
            **{_actions(config, each): held((0, 600), (1, 2400)) for each in ("recovered", "released", "rejected")},
        },
        {900: (), happened - GRID: (), happened: (firing,), happened + 900 - GRID: (firing,), happened + 900: ()},
    )


def _flapping(config: AlertsConfig) -> AlertCase:
    allowed, begins, apart = config.flapping_actions, 3600, 120
    last = begins + allowed * apart
    counts = [(float(k), apart) for k in range(1, allowed + 1)]
    firing = Firing(
        run_labels(config),
        "The autopilot of run wla-7 goes in circles",
        f"{allowed + 1} interventions were applied in the last hour, more than {allowed}. Layers recover and collapse "
        "again, or one remedy provokes the next.",
    )
    return AlertCase(
        "one action more than allowed within the hour, on both ranks alike",
        "InterventionFlapping",
        "warning",
        {_actions(config, "applied", rank): held((0, begins), *counts, (allowed + 1, 3600)) for rank in (0, 1)},
        {last - GRID: (), last: (firing,), begins + 3600 - GRID: (firing,), begins + 3600: ()},
    )


def _ineffective(config: AlertsConfig) -> AlertCase:
    collapses, wait = 1200, on_grid(config.ineffective_for_seconds)
    acts = collapses + 600
    fires = acts + wait
    window_closed = acts + wait + 3600
    recovers = window_closed + 600
    firing = _still_collapsed(config)
    return AlertCase(
        "one action that does not help; firing until the layer is healthy, also after the window has closed",
        "InterventionIneffective",
        "critical",
        {
            _collapsed(config): held((0, collapses), (1, recovers - collapses), (0, 600)),
            _actions(config, "applied"): held((0, acts), (1, recovers + 600 - acts)),
        },
        {
            fires - GRID: (),
            fires: (firing,),
            window_closed: (firing,),
            recovers - GRID: (firing,),
            recovers: (),
            recovers + 300: (),
        },
    )


def _rescued(config: AlertsConfig) -> AlertCase:
    wait = on_grid(config.ineffective_for_seconds)
    return AlertCase(
        "an action that helps before the wait is over",
        "InterventionIneffective",
        "critical",
        {
            _collapsed(config): held((0, 600), (1, wait), (0, wait)),
            _actions(config, "applied"): held((0, 600), (1, 2 * wait)),
        },
        {600 + wait - GRID: (), 600 + wait: (), 600 + wait + 600: ()},
    )


def _long_before(config: AlertsConfig) -> AlertCase:
    wait = on_grid(config.ineffective_for_seconds)
    collapses = 600 + 3600 + 60  # more than an hour after the action: the window closes before the wait is over
    return AlertCase(
        "an action from more than an hour before the collapse has no part in it",
        "InterventionIneffective",
        "critical",
        {
            _collapsed(config): held((0, collapses), (1, 2 * wait)),
            _actions(config, "applied"): held((0, 600), (1, collapses + 2 * wait)),
        },
        {collapses + wait: (), collapses + 2 * wait - GRID: ()},
    )


def _still_collapsed(config: AlertsConfig) -> Firing:
    return Firing(
        run_labels(config),
        "Run wla-7 is still collapsed although the autopilot acted",
        f"Collapsed layers of run wla-7: 1. At no moment of the last {duration(config.ineffective_for_seconds)} was "
        "there none, although an intervention was applied. The run goes on at its full cost: decide whether it should.",
    )
