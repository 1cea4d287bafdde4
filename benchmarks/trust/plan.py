"""Says which variants of a run still have to be trained, from the results so far.

A training in mode auto in which nothing was applied is bit for bit the control: it stands for it. A training without a
metric, in which a second diagnosis that was given the metric proposed nothing either, stands for the variant with the
metric too. The remedy is needed where the label is in doubt, and the repeated controls where something was treated,
because only a treated run can be harmed. The first seen run of some kinds is trained in full all the same, which checks
both claims.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.trust.settings import Target, TrustRun, Variant, thresholds_digest

Results = dict[str, Any]
"""Variant -> result of one run."""
AUTOPILOT: tuple[Variant, ...] = ("auto", "auto_metric")
CHECKED_KINDS = ("text", "copy", "transformers")
"""Kinds whose first seen run is trained in full, whatever stands for what."""


def missing(runs: Sequence[TrustRun], results: Iterable[dict[str, Any]]) -> list[tuple[str, Variant]]:
    """Return name and variant of the trainings that are needed next; none when every run has its verdict.

    Args:
        runs: the runs that are asked for.
        results: what was trained so far. Failed trainings, and those of other settings, do not count, nor in mode auto
            those under other thresholds.
    """
    thresholds, digests = thresholds_digest(), {run.name: run.digest for run in runs}
    done: dict[str, Results] = defaultdict(dict)
    for result in results:
        of_now = result["variant"] not in AUTOPILOT or result.get("thresholds") == thresholds
        if "error" not in result and of_now and result.get("settings") == digests.get(result["name"]):
            done[result["name"]][result["variant"]] = result
    treated = {run.kind for run in runs if any(map(is_treated, done[run.name].values()))}
    checks = {run.kind: run.name for run in reversed(runs) if run.kind in CHECKED_KINDS and run.split == "seen"}
    return [
        (run.name, variant)
        for run in runs
        for variant in _next(run, done[run.name], run.name in checks.values(), run.kind in treated)
        if variant not in done[run.name]
    ]


def completed(done: Results) -> Results:
    """Return the results of one run, with those that another one stands for."""
    whole = dict(done)
    for variant in ("auto_metric", "control"):
        twin = next((done[name] for name in AUTOPILOT if name in done and variant in done[name]["stands_for"]), None)
        if variant not in done and twin is not None:
            whole[variant] = {**twin, "variant": variant}
    return whole


def is_solved(result: dict[str, Any]) -> bool:
    """Return whether the final metric reaches the target."""
    target = Target(**result["target"])
    if target.metric == "loss":
        return result["loss"] is not None and bool(result["loss"] <= target.solved)
    return bool(result["accuracy"] >= target.solved)


def is_treated(result: dict[str, Any]) -> bool:
    """Return whether the autopilot changed a layer."""
    return any(action["outcome"] == "applied" for action in result["actions"])


def _next(run: TrustRun, done: Results, in_full: bool, kind_is_treated: bool) -> tuple[Variant, ...]:
    """Return the variants that the results so far ask for."""
    whole = done if in_full else completed(done)
    asked = [variant for variant in (*AUTOPILOT, "control") if variant not in whole]
    if asked:
        # One after the other: the first may stand for the rest.
        return tuple(asked) if in_full else (asked[0],)
    needed: list[Variant] = []
    rescued = any(is_treated(whole[name]) and is_solved(whole[name]) for name in AUTOPILOT)
    in_doubt = run.setting.check_label and not is_solved(whole["control"])
    if in_doubt and not (run.label == "collapsed" and rescued):
        needed.append("remedy")
    if run.split == "seen" and kind_is_treated:
        needed.append("repeat")
    return tuple(needed)
