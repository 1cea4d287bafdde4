"""How good the rules of the diagnosis have proved to be, on runs whose outcome was known.

The figures hold for `MEASURED_WITH` and for nothing else, so a page shows them only where a run was judged by these
settings. `python -m benchmarks.detector` measures them; a test compares, and says when either of the two has moved.
"""

from __future__ import annotations

from collections.abc import Mapping

from ess_monitor.report.parts import Table

MEASURED_WITH: Mapping[str, bool | int | float] = {
    "collapsed_below": 0.3,
    "collapsed_recovers_above": 0.35,
    "starved_below": 0.5,
    "starved_recovers_above": 0.55,
    "retention_below": 0.75,
    "retention_recovers_above": 0.85,
    "saturated_above": 0.97,
    "saturated_recovers_below": 0.9,
    "patience": 5,
    "saturated_patience": 10,
    "trend_window": 10,
    "plateau_window": 20,
    "rising_ratio": 0.1,
    "spare_first_layer": True,
    "judge_uninformative": False,
    "metric_progress_ratio": 0.1,
}
"""Settings behind the figures. Warm-up and task metric are missing: those each run is told by its user."""

HELD_OUT = Table(
    "The default rules on 17 labelled runs that no threshold was chosen with",
    ("the run turned out", "runs", "called collapsed or full", "rightly", "found before 40 % of the training"),
    (
        ("healthy", "8", "0", "–", "–"),
        ("collapsed", "7", "5", "5 (precision 1.00)", "5 of 7"),
        ("too small a state", "2", "0", "–", "0 of 2"),
    ),
)


def judged_as_measured(diagnosis: Mapping[str, object]) -> bool:
    """Whether a run was judged by the settings that the figures belong to.

    >>> judged_as_measured(dict(MEASURED_WITH)), judged_as_measured({**MEASURED_WITH, "patience": 3})
    (True, False)
    """
    return all(name in diagnosis and diagnosis[name] == value for name, value in MEASURED_WITH.items())


def how_far_it_carries(diagnosis: Mapping[str, object]) -> str:
    """What the figures say of the run at hand, and what they do not."""
    text = (
        "The runs were small recall nets (WLA, GLA, GLA-S6 and linear attention, two layers, sequences of 32 or 64 "
        "tokens), judged with their accuracy as task metric and a warm-up of a seventh of the run. No healthy one of "
        "the eight was called ill. That does not make a false alarm impossible in another model, and the figures on "
        "full states rest on two runs."
    )
    if diagnosis.get("metric") is None:
        text += " This run gave the diagnosis no task metric; how good the rules are without one was not measured."
    return text
