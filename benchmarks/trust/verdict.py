"""Judges the results: false alarms, treated, harmed and rescued runs, and names every miss.

    false alarm  a healthy run with a layer that is called collapsed; "forgets by choice" is none
    treated      an action with the outcome applied
    harmed       the final loss is above the control's by more than the noise of the kind, or not finite; or the control
                 solves the task, and the run does not
    noise        twice the root mean square of the change of the log loss from `control` to `repeat` over the seen runs
                 of a kind, between `LEAST_NOISE` and `MOST_NOISE`: what other samples change alone. Final losses are
                 means over the last evaluations. The held-out half has no part in it.
    log loss     log(loss + `SMALL_LOSS`): the ratio of two losses near 0 says nothing
    collapse     a candidate whose control ends unsolved, and which a remedy solves: the variant `remedy`, or mode auto
    rescued      a collapse that ends solved in mode auto

A candidate that is no collapse is left out of the alarms and rescues, and named; so is a healthy run that the remedy
solves and the control does not. Harm is counted over all runs. Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.trust.plan import completed, is_solved, is_treated

TITLES = {"auto_metric": "auto, with the metric", "auto": "auto, without a metric"}
"""The variants that are judged, and their titles."""
LEAST_NOISE, MOST_NOISE = 0.001, 0.1
"""Where one control solves the task and another does not, losses differ by far more than a harm may."""
SMALL_LOSS = 0.03
"""Nats: a hundredth of what guessing one of twenty tokens costs."""
Z_95 = 1.959964


@dataclass(frozen=True)
class Proportion:
    """A count out of a total, with its 95 % Wilson interval."""

    count: int
    total: int

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end."""
        if not self.total:
            return 0.0, 1.0
        share, square = self.count / self.total, Z_95**2 / self.total
        middle = (share + square / 2) / (1 + square)
        half = math.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        if not self.total:
            return "-"
        low, high = self.interval
        return f"{self.count} of {self.total} ({100 * low:.0f} to {100 * high:.0f} %)"


@dataclass
class HalfVerdict:
    """The verdict on one half of the catalog."""

    split: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One row per variant."""
    kinds: list[dict[str, Any]] = field(default_factory=list)
    """One row per kind."""
    misses: list[str] = field(default_factory=list)
    """Every false alarm, harmed run and collapse that was not rescued."""
    left_out: list[str] = field(default_factory=list)
    """Runs without a verdict or with a label that did not hold, with the reason."""
    thresholds: set[str] = field(default_factory=set)
    """Digests of the thresholds under which the results were taken."""


JobResult = dict[str, Any]
Variants = dict[str, JobResult]


def judge(results: Iterable[JobResult], names: Collection[str] | None = None) -> list[HalfVerdict]:
    """Return the verdict on the held-out half and on the seen half, as far as there are results.

    With `names` only these runs are judged, by the noise of all results.
    """
    runs: dict[str, Variants] = defaultdict(dict)
    for result in results:
        if "error" not in result:
            runs[result["name"]][result["variant"]] = result
    runs = {name: completed(run) for name, run in runs.items()}
    noise = noise_by_kind(runs.values())
    halves = []
    for split in ("held_out", "seen"):
        half = {
            name: run
            for name, run in runs.items()
            if next(iter(run.values()))["split"] == split and (names is None or name in names)
        }
        if half:
            halves.append(judge_half(split, half, noise))
    return halves


def judge_half(split: str, runs: dict[str, Variants], noise: dict[str, float]) -> HalfVerdict:
    """Return the verdict on the runs of one half."""
    verdict = HalfVerdict(split)
    verdict.thresholds = {run[variant]["thresholds"] for run in runs.values() for variant in TITLES if variant in run}
    truths = {name: truth(run) for name, run in runs.items()}
    verdict.left_out += [f"{name}: {reason}" for name, (label, reason) in truths.items() if label is None]
    verdict.left_out += [f"{name}: {text}" for name, run in runs.items() for text in inconsistencies(run)]
    for variant, title in TITLES.items():
        judged = {name: run for name, run in runs.items() if variant in run and "control" in run}
        healthy = [name for name in judged if truths[name][0] == "healthy"]
        collapses = [name for name in judged if truths[name][0] == "collapsed"]
        alarms = [name for name in healthy if collapsed_at(judged[name][variant])]
        found = [name for name in collapses if collapsed_at(judged[name][variant])]
        harmed = [name for name in judged if is_harmed(judged[name], variant, noise)]
        rescued = [name for name in collapses if is_solved(judged[name][variant])]
        verdict.rows.append(
            {
                "mode": title,
                "false alarms": str(Proportion(len(alarms), len(healthy))),
                "healthy treated": str(Proportion(sum(is_treated(judged[n][variant]) for n in healthy), len(healthy))),
                "harmed": str(Proportion(len(harmed), len(judged))),
                "collapses found": str(Proportion(len(found), len(collapses))),
                "rescued": str(Proportion(len(rescued), len(collapses))),
                "median accuracy, control": _median(judged[name]["control"]["accuracy"] for name in collapses),
                "median accuracy": _median(judged[name][variant]["accuracy"] for name in collapses),
            }
        )
        verdict.misses += [f"{title}: {name}: false alarm {collapsed_at(judged[name][variant])}" for name in alarms] + [
            f"{title}: {name}: harmed, loss {_shown(judged[name]['control'])} -> {_shown(judged[name][variant])} "
            f"(noise {100 * noise.get(judged[name][variant]['kind'], LEAST_NOISE):.1f} %)"
            for name in harmed
        ]
        for name in collapses:
            if name not in rescued:
                result = judged[name][variant]
                when = f"found {collapsed_at(result)}" if name in found else "not found"
                verdict.misses.append(f"{title}: {name}: not rescued, accuracy {result['accuracy']:.3f}, {when}")
    verdict.kinds = _by_kind(runs, truths, noise)
    return verdict


def truth(run: Variants) -> tuple[str | None, str]:
    """Return the label that the controls support, or None and the reason why the run is left out."""
    label = next(iter(run.values()))["label"]
    control, remedy = run.get("control"), run.get("remedy")
    if control is None:
        return None, "no result of the control"
    if label == "healthy":
        if remedy is not None and is_solved(remedy) and not is_solved(control):
            return None, f"labeled healthy, but the remedy solves it ({_accuracies(control, remedy)})"
        return "healthy", ""
    if is_solved(control):
        return None, f"no collapse: the control solves it (accuracy {control['accuracy']:.3f})"
    rescues = [run[name] for name in TITLES if name in run and is_treated(run[name])]
    if any(map(is_solved, rescues)):
        return "collapsed", ""
    if remedy is None:
        return None, "no result of the remedy, which must confirm the label"
    if not is_solved(remedy):
        return None, f"no collapse: the remedy does not solve it either ({_accuracies(control, remedy)})"
    return "collapsed", ""


def noise_by_kind(runs: Iterable[Variants]) -> dict[str, float]:
    """Return the noise of log(final loss) of every kind of which the seen half has repeated controls."""
    changes: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        control, repeat = run.get("control"), run.get("repeat")
        if control is not None and repeat is not None and control["split"] == "seen":
            change = log_ratio(repeat, control)
            if math.isfinite(change):
                changes[control["kind"]].append(change)
    return {
        kind: min(MOST_NOISE, max(LEAST_NOISE, 2 * math.sqrt(statistics.fmean(change**2 for change in values))))
        for kind, values in changes.items()
    }


def log_ratio(result: JobResult, control: JobResult) -> float:
    """Return by how much the log loss is above that of the control; infinite where the loss alone is not finite."""
    if control["loss"] is None or result["loss"] is None:
        return 0.0 if control["loss"] is None else math.inf
    return math.log((result["loss"] + SMALL_LOSS) / (control["loss"] + SMALL_LOSS))


def is_harmed(run: Variants, variant: str, noise: dict[str, float]) -> bool:
    """Return whether the variant ends worse than the control by more than the noise, or unlike it unsolved."""
    lost = is_solved(run["control"]) and not is_solved(run[variant])
    return lost or log_ratio(run[variant], run["control"]) > noise.get(run[variant]["kind"], LEAST_NOISE)


def collapsed_at(result: JobResult) -> str:
    """Return where and when a layer was first called collapsed; empty if none was."""
    for finding in result["findings"]:
        if finding["condition"] == "collapsed":
            evidence = finding["evidence"]
            said = "without evidence" if evidence is None else evidence["outcome"]
            return f"at step {finding['step']} in {finding['layer']}, {said}"
    return ""


def inconsistencies(run: Variants) -> list[str]:
    """Return what contradicts the protocol: another start, or a change without an action."""
    texts: list[str] = []
    control = run.get("control")
    if control is None:
        return texts
    for variant, result in run.items():
        if variant != "repeat" and result["start"] != control["start"]:
            texts.append(f"{variant} began with other data or weights than the control")
        if variant in TITLES and not is_treated(result) and result["loss"] != control["loss"]:
            texts.append(f"{variant} ended with another loss than the control, and nothing was treated")
    pair = [run[variant] for variant in TITLES if variant in run]
    if len(pair) == 2 and "auto_metric" in pair[1]["stands_for"] and pair[0]["loss"] != pair[1]["loss"]:
        texts.append("auto_metric ended with another loss than auto, which stood for it")
    return texts


def _by_kind(
    runs: dict[str, Variants], truths: dict[str, tuple[str | None, str]], noise: dict[str, float]
) -> list[dict[str, Any]]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, run in runs.items():
        kinds[next(iter(run.values()))["kind"]].append(name)
    rows = []
    for kind, names in kinds.items():
        # Both variants of a run count: each is a training of its own.
        pairs = [(name, variant) for name in names for variant in TITLES if {variant, "control"} <= runs[name].keys()]
        healthy = [(name, variant) for name, variant in pairs if truths[name][0] == "healthy"]
        collapses = [(name, variant) for name, variant in pairs if truths[name][0] == "collapsed"]
        rows.append(
            {
                "kind": kind,
                "runs": len(names),
                "trainings in mode auto": len(pairs),
                "false alarms": f"{sum(bool(collapsed_at(runs[n][v])) for n, v in healthy)} of {len(healthy)}",
                "treated": sum(is_treated(runs[n][v]) for n, v in pairs),
                "harmed": sum(is_harmed(runs[n], v, noise) for n, v in pairs),
                "worse at all": sum(log_ratio(runs[n][v], runs[n]["control"]) > 0 for n, v in pairs),
                "rescued": f"{sum(is_solved(runs[n][v]) for n, v in collapses)} of {len(collapses)}",
                "noise": f"{100 * noise[kind]:.1f} %" if kind in noise else f"{100 * LEAST_NOISE:.1f} % (least)",
            }
        )
    return rows


def _accuracies(control: JobResult, remedy: JobResult) -> str:
    return f"accuracy {control['accuracy']:.3f} -> {remedy['accuracy']:.3f}"


def _shown(result: JobResult) -> str:
    return "not finite" if result["loss"] is None else f"{result['loss']:.4g}"


def _median(values: Iterable[float]) -> str:
    kept: Sequence[float] = list(values)
    return f"{statistics.median(kept):.3f}" if kept else "-"
