"""Labels the runs by what a larger state gained, and replays their recorded numbers through the diagnosis.

    gain        (loss of the run - loss with twice the state) / loss of guessing, final losses of the same seed and data
    saturated   the gain is `GAIN` or more, and above the noise
    not         the gain is below `NO_GAIN`, or within the noise and below `GAIN`
    left out    anything in between; named
    noise       twice the root mean square of the differences of the final losses, over the loss of guessing, between
                seeds of one setting; over the settings of a kind, all recorded runs

A run counts as found if one of its layers is called saturated. The replay is that of a run whose loss can be run again:
evidence asked for at a measurement is that of the first probe after it. Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.saturation.training import KEPT
from benchmarks.trust.runner import JobResult
from benchmarks.trust.verdict import Proportion
from ess_monitor.diagnosis import DiagnosisConfig, Tracker
from ess_monitor.evidence import EvidenceConfig
from ess_monitor.evidence.verdict import weigh_state
from ess_monitor.records import Changes, Finding, Reading, StateEvidence

GAIN, NO_GAIN = 0.05, 0.01
"""Of the loss of guessing. They were set before the first run was trained, with three pairs of a prototype in view."""
WARMUP = 1 / 7
"""Warm-up as a share of the run's length, as `DiagnosisConfig.warmup_steps` recommends."""
POSITIONS = 3
"""Positions of a measurement: a quarter, a half and three quarters of the sequence."""

Variants = dict[str, JobResult]


@dataclass
class Labeled:
    """One run, its label and what the diagnosis says of it."""

    run: JobResult
    gain: float
    label: str
    """saturated, not, or left out."""
    finding: Finding | None = None
    """The first layer that is called saturated."""
    examined: list[StateEvidence] = field(default_factory=list)


def label_runs(results: Iterable[JobResult]) -> list[Labeled]:
    """Return every run that has a result with twice its state."""
    by_name: dict[str, Variants] = defaultdict(dict)
    for result in results:
        if "error" not in result:
            by_name[result["name"]][result["variant"]] = result
    noise = noise_by_kind([run["base"] for run in by_name.values() if "base" in run])
    labeled = []
    for variants in by_name.values():
        run = variants.get("base")
        if run is None:
            continue
        double = by_name.get(run["double"], {}).get("base") if run["double"] else variants.get("double")
        if double is None:
            continue
        gain = (run["loss"] - double["loss"]) / run["guess"]
        labeled.append(Labeled(run, gain, label_of(gain, noise.get(run["kind"], 0.0))))
    return labeled


def label_of(gain: float, noise: float) -> str:
    """Return the label of a run whose state was doubled."""
    if gain >= GAIN:
        return "saturated" if gain > noise else "left out"
    return "not" if gain < max(NO_GAIN, min(noise, GAIN)) else "left out"


def noise_by_kind(runs: Iterable[JobResult]) -> dict[str, float]:
    """Return the noise of the gain of every kind of which runs differ in nothing but their seed."""
    losses: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run in runs:
        losses[run["kind"], run["settings"]].append(run["loss"] / run["guess"])
    squares: dict[str, list[float]] = defaultdict(list)
    for (kind, _), values in losses.items():
        if len(values) > 1:
            squares[kind].append(2 * statistics.variance(values))  # of a difference of two
    return {kind: 2 * math.sqrt(statistics.fmean(values)) for kind, values in squares.items()}


def replay(
    labeled: Labeled, diagnosis: DiagnosisConfig | None = None, evidence: EvidenceConfig | None = None
) -> Labeled:
    """Give the run's recorded numbers to the diagnosis, and note what it says.

    Without `EvidenceConfig.enabled` the readings alone decide.
    """
    run = labeled.run
    diagnosis, evidence = diagnosis or DiagnosisConfig(), evidence or EvidenceConfig()
    target = run["target"]
    settings = {
        "metric": target["metric"],
        "metric_solved": target["solved"],
        "metric_mode": "min" if target["metric"] == "loss" else "max",
        "warmup_steps": round(WARMUP * run["steps"]),
    }
    layers = list(run["rows"][0]["layers"])
    examined = dict.fromkeys(layers, "") if evidence.enabled else None
    tracker = Tracker(
        diagnosis.model_copy(update=settings),
        examined_states=examined,
        recheck_measurements=evidence.recheck_measurements,
    )
    asked: dict[str, int] = {}
    for row in run["rows"]:
        readings = readings_of(run, row)
        ends = {reading.layer: reading.spectrum_end_ratio for reading in readings}
        found: dict[str, StateEvidence] = {}
        for layer, since in tuple(asked.items()):
            sums = next((p["layers"][layer] for p in run["probes"] if since < p["step"] <= row["step"]), None)
            if sums is not None:
                changes = Changes(int(sums[0]), *sums[1:], kind="state_loss")
                found[layer] = weigh_state(layer, row["step"], changes, evidence, ends.get(layer))
                labeled.examined.append(found[layer])
                del asked[layer]
        findings = tracker.observe(readings, row["metrics"], row["step"], found)
        labeled.finding = next((f for f in findings if f.condition == "saturated"), None)
        if labeled.finding is not None:
            return labeled
        asked = {layer: asked.get(layer, row["step"]) for layer in tracker.full_suspects}
    return labeled


def readings_of(run: JobResult, row: dict[str, Any]) -> list[Reading]:
    """Return the readings of one recorded measurement."""
    length = run["length"]
    positions = tuple(round(k * length / (POSITIONS + 1)) for k in range(1, POSITIONS + 1))
    common = {"step": row["step"], "status": "ok", "length": length, "positions": positions}
    return [
        Reading(layer=layer, **common, **dict(zip(KEPT, values, strict=True)))
        for layer, values in row["layers"].items()
    ]


@dataclass
class HalfVerdict:
    """Precision and recall on one half."""

    split: str
    row: dict[str, Any]
    misses: list[str]
    left_out: list[str]


def judge_half(split: str, runs: Iterable[Labeled]) -> HalfVerdict:
    """Count what was found against the labels, and name what was not as it should be."""
    half = [each for each in runs if each.run["split"] == split]
    saturated = [each for each in half if each.label == "saturated"]
    others = [each for each in half if each.label == "not"]
    right = [each for each in saturated if each.finding is not None]
    wrong = [each for each in others if each.finding is not None]
    shares = [each.finding.step / each.run["steps"] for each in right if each.finding is not None]
    row = {
        "saturated": len(saturated),
        "not saturated": len(others),
        "precision": str(Proportion(len(right), len(right) + len(wrong))),
        "recall": str(Proportion(len(right), len(saturated))),
        "latest, share of training": f"{max(shares):.0%}" if shares else "-",
    }
    misses = [f"{_described(each)}: saturated, not found" for each in saturated if each.finding is None]
    misses += [f"{_described(each)}: not saturated, called so at step {each.finding.step}" for each in wrong]  # type: ignore[union-attr]
    left_out = [_described(each) for each in half if each.label == "left out"]
    return HalfVerdict(split, row, misses, left_out)


def _described(each: Labeled) -> str:
    name = each.run["name"]
    return f"{name} (loss {each.run['loss']:.3g}, twice the state gains {each.gain:+.1%} of the loss of guessing)"
