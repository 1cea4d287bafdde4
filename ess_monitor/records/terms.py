"""The fixed terms of the records: statuses, conditions, phases, parts, and the kinds and outcomes of actions."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Status = Literal["ok", "nonfinite", "too_short", "timed_out", "dropped", "failed", "skipped", "deferred"]
"""How a reading ended. Only `ok` carries sizes that mean something; every other status keeps the reason. skipped: the
layer is not causal, or not known to be, and is left out from then on. deferred: this sample had no time for the layer,
and one of the next has."""

Condition = Literal["unknown", "healthy", "forgets_by_choice", "unused", "saturated", "collapsed"]
"""What the diagnosis says of a layer. Everything else about a condition is in `CONDITION_INFO`."""

RunStatus = Literal["starting", "running", "finished", "failed", "terminated"]
"""Where a run is. terminated: the process was told to end (SIGTERM) before the run was over."""

Phase = Literal["capture", "replay", "measure", "diagnose", "intervene", "export"]
"""What the monitor's own time went into."""

Part = Literal["capture", "replay", "worker", "measurement", "agreement", "diagnosis", "intervention", "export"]
"""A part of the monitor that fails, and is turned off, by itself. agreement: between the ranks of a distributed run."""

Outcome = Literal["ok", "skipped", "failed"]
"""How a sampled step ended. skipped: queue full, nothing captured, or ranks that did not agree in time."""

ActionKind = Literal["pull_to_identity", "rescale_alpha", "advise"]
"""What an intervention does: attach the A->I regularizer, divide log A by a factor, or only say something."""

ActionOutcome = Literal["applied", "dry_run", "rejected", "failed", "rolled_back", "recovered", "released"]
"""How it ended. applied: done. dry_run: would have been done (mode advise, or advice to
follow by hand). rejected: not done, for the reason given. failed: the ladder came to its end without a recovery, the
regularizer itself failed, or what was done could not be undone. rolled_back: undone because the loss broke.
recovered: the layer is healthy again. released: the regularizer was taken off."""

ACTIONS: tuple[ActionKind, ...] = get_args(ActionKind)
ACTION_OUTCOMES: tuple[ActionOutcome, ...] = get_args(ActionOutcome)
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
RUN_STATUSES: tuple[RunStatus, ...] = get_args(RunStatus)
PHASES: tuple[Phase, ...] = get_args(Phase)
PARTS: tuple[Part, ...] = get_args(Part)
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
MEASURED: tuple[Status, ...] = ("ok", "nonfinite", "too_short")
"""A reading with one of these was taken and computed, whatever came of it."""


class ConditionInfo(NamedTuple):
    """Declares what all sinks, dashboards and alerts say of a condition."""

    color: str
    """Name of its color, the same everywhere: gray, green, yellow or red."""
    needs_attention: bool
    """Whether somebody should look: it is marked in pages and tables, logged as a warning, and has an alert."""
    alert: str
    """Name of its alert, without the prefix; empty where there is none."""
    predicate: str
    """What a layer in it does, after the layer's name: "is saturated"."""
    meaning: str
    """One sentence for a legend."""


CONDITION_INFO: dict[Condition, ConditionInfo] = {
    "unknown": ConditionInfo("gray", False, "", "is not judged", "It is too early to say, or ESS says little of it."),
    "healthy": ConditionInfo("green", False, "", "is healthy", "The state is in use and has room."),
    "forgets_by_choice": ConditionInfo(
        "green", False, "", "forgets by choice", "Little of the state is in use, and the loss prefers it so."
    ),
    "unused": ConditionInfo(
        "yellow",
        False,
        "",
        "is unused",
        "Nothing of the past reaches the loss: the task needs none of it, or the layer has collapsed.",
    ),
    "saturated": ConditionInfo("yellow", True, "StateSaturated", "is saturated", "The state is full."),
    "collapsed": ConditionInfo(
        "red", True, "StateCollapsed", "has collapsed", "The state is not used, and the loss gains nothing by that."
    ),
}
"""Every condition, in the order of severity. A new one is a name in `Condition`, a line here and a rule."""


COLOR_SCALE = ("#120f3d", "#33338c", "#1a7399", "#40b373", "#fae833")
"""Colors of a share, evenly spaced from 0 to 1, in pages and pictures alike. Lightness rises all the way, so that the
order also shows in grayscale and to color-blind readers."""


def condition_title(condition: Condition) -> str:
    """Return the name of a condition as it is shown: "forgets by choice"."""
    return condition.replace("_", " ")
