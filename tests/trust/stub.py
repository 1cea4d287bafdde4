"""Results without a training, for the tests of the runner and of the verdict."""

from __future__ import annotations

from typing import Any

from benchmarks.trust.catalog import CATALOG
from benchmarks.trust.settings import thresholds_digest


def outcome(job: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a job that found nothing and stands for its control; works in a worker of Ray."""
    run = next(run for run in CATALOG if run.name == job["name"])
    described = {"kind": run.kind, "label": run.label, "split": run.split, "seed": run.seed, "settings": run.digest}
    stands_for = ["control", "auto_metric"] if job["variant"] == "auto" else []
    return result(run.name, job["variant"], stands_for=stands_for, **described)


def result(name: str, variant: str, **changes: Any) -> dict[str, Any]:
    """Return a result with every field, of a healthy run of the seen half that found nothing."""
    return {
        "name": name,
        "variant": variant,
        "kind": "copy",
        "label": "healthy",
        "seed": 100,
        "split": "seen",
        "settings": "0",
        "thresholds": thresholds_digest(),
        "start": "0",
        "steps": 2400,
        "target": {"metric": "accuracy", "solved": 0.9},
        "loss": 1.0,
        "accuracy": 0.95,
        "evaluations": [],
        "findings": [],
        "actions": [],
        "conditions": {},
        "stands_for": [],
        "seconds": 1.0,
        "monitor_seconds": 0.1,
        **changes,
    }


def finding(condition: str, step: int = 1400, evidence: str | None = "loud") -> dict[str, Any]:
    """Return a finding as a result holds it."""
    said = None if evidence is None else {"outcome": evidence}
    return {"step": step, "layer": "blocks.1", "condition": condition, "previous": "unknown", "evidence": said}


def action(outcome: str) -> dict[str, Any]:
    """Return an action as a result holds it."""
    return {
        "step": 1400,
        "layer": "blocks.1",
        "action": "pull_to_identity",
        "outcome": outcome,
        "strength": 0.5,
        "message": "",
    }
