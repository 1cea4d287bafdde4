"""Tests of the alerts on the autopilot."""

from __future__ import annotations

from collections.abc import Iterator

from ess_monitor.alerts.cases.base import GRID, LAYER, AlertCase, Firing, between, held, on_grid, run_labels, series
from ess_monitor.alerts.config import AlertsConfig


def intervention_cases(config: AlertsConfig) -> Iterator[AlertCase]:
    """Yield the tests of every alert of the group, silent, firing and resolved."""
    yield from _failing(config)
    yield _flapping(config)
    yield from _ineffective(config)


def _actions(config: AlertsConfig, outcome: str, rank: int = 0) -> str:
    return series(config, "ess_monitor_interventions_total", rank, action="pull_to_identity", outcome=outcome)


def _failing(config: AlertsConfig) -> Iterator[AlertCase]:
    happens, once = 1200, held((0, 1200), (1, 1800))
    earlier = held((0, 600), (1, 2400))

    def expected(outcome: str, *texts: str) -> dict[int, tuple[Firing, ...]]:
        summary, description = texts
        firing = Firing(
            run_labels(config, action="pull_to_identity", outcome=outcome), texts=(summary, description + _LOOK)
        )
        return {900: (), **between(happens, happens + 900, firing)}

    yield AlertCase(
        "both ranks count the same failure, which is one alert; an applied action does not fire",
        "InterventionFailing",
        {**{_actions(config, "failed", rank): once for rank in (0, 1)}, _actions(config, "applied"): earlier},
        expected(
            "failed",
            "An intervention in run wla-7 has failed",
            "Within the last 15 minutes pull_to_identity did not make its layer recover, or could not go on.",
        ),
    )
    yield AlertCase(
        "the loss breaks under a treatment, which is undone; its other outcomes do not fire",
        "InterventionFailing",
        {
            _actions(config, "rolled_back"): once,
            **{_actions(config, outcome): earlier for outcome in ("recovered", "released", "rejected")},
        },
        expected(
            "rolled_back",
            "An intervention in run wla-7 has been rolled back",
            "Within the last 15 minutes pull_to_identity was undone: the loss broke, would have been lower without it, "
            "or gained nothing by it.",
        ),
    )


_LOOK = " The event log names the layer and the reason."


def _flapping(config: AlertsConfig) -> AlertCase:
    allowed, begins, apart = config.flapping_actions, 3600, 120
    counts = [(float(k), apart) for k in range(1, allowed + 1)]
    return AlertCase(
        "one action more than allowed within the hour, on both ranks alike",
        "InterventionFlapping",
        {_actions(config, "applied", rank): held((0, begins), *counts, (allowed + 1, 3600)) for rank in (0, 1)},
        between(begins + allowed * apart, begins + 3600, Firing(run_labels(config), str(allowed + 1))),
    )


def _ineffective(config: AlertsConfig) -> Iterator[AlertCase]:
    wait = on_grid(config.ineffective_for_seconds)
    collapsed = series(config, "ess_monitor_layer_condition", layer=LAYER, condition="collapsed")
    applied = _actions(config, "applied")
    firing = Firing(run_labels(config), "1")

    collapses, acts = 1200, 1800
    closes = acts + wait + 3600
    recovers = closes + 600
    yield AlertCase(
        "one action that does not help; firing until the layer is healthy, also after the window has closed",
        "InterventionIneffective",
        {
            collapsed: held((0, collapses), (1, recovers - collapses), (0, 600)),
            applied: held((0, acts), (1, recovers + 600 - acts)),
        },
        {**between(acts + wait, recovers, firing), closes: (firing,), recovers + 300: ()},
    )
    yield AlertCase(
        "an action that helps before the wait is over",
        "InterventionIneffective",
        {collapsed: held((0, 600), (1, wait), (0, wait)), applied: held((0, 600), (1, 2 * wait))},
        {600 + wait - GRID: (), 600 + wait: (), 600 + wait + 600: ()},
    )
    late = 600 + 3600 + 60  # more than an hour after the action: the window closes before the wait is over
    yield AlertCase(
        "an action from more than an hour before the collapse does not count",
        "InterventionIneffective",
        {collapsed: held((0, late), (1, 2 * wait)), applied: held((0, 600), (1, late + 2 * wait))},
        {late + wait: (), late + 2 * wait - GRID: ()},
    )
