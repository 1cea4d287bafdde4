"""Records for the exporter tests, from the plainest to the oddest."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

from ess_monitor.records import (
    PHASES,
    Action,
    Condition,
    Evidence,
    Finding,
    HistogramData,
    LayerInfo,
    Measurement,
    Reading,
    RunInfo,
    RunStatus,
    Snapshot,
    StateEvidence,
)

PLAIN_LAYERS = ("blocks.0.mixer", "blocks.1.mixer")
ODD_LAYERS = (
    "",
    "a b",
    "a_b",
    '<script>alert("x")</script>',
    "Schicht.ß.注意",
    'quote" back\\slash',
    "line\nbreak",
    "\x1b[2J",
)
STATUSES = ("ok", "nonfinite", "too_short", "timed_out", "dropped", "failed")


def reading(layer: str = "blocks.0.mixer", step: int = 100, **fields: Any) -> Reading:
    """A full reading of status ok; `fields` replace its own."""
    values: dict[str, Any] = {
        "status": "ok",
        "operators": 4,
        "length": 64,
        "positions": (16, 32, 48),
        "state_capacity": 16.0,
        "attainable_size": 16.0,
        "effective_size": 4.0,
        "entropy_size": 2.5,
        "total_effective_size": 16.0,
        "total_state_capacity": 64.0,
        "minimum_effective_size": 3.0,
        "effective_size_between": 4.25,
        "effective_size_lower": 3.5,
        "effective_size_upper": 5.0,
        "utilization_ratio": 0.25,
        "retention_ratio": 0.5,
        "mean_decay": 0.9,
        "decay_product_norm": 0.1,
        "far_share_ratio": 0.125,
        "per_head": (3.0, 4.0, 4.0, 5.0),
        "heads": (0, 1, 2, 3),
        "per_position": (4.0, 4.0, 4.0),
        "ranks": 2,
        "utilization_min_ratio": 0.2,
        "worst_rank": 1,
    }
    return Reading(step=step, layer=layer, **{**values, **fields})


def finding(layer: str = "blocks.0.mixer", step: int = 100) -> Finding:
    return Finding(
        step=step, layer=layer, condition="collapsed", previous="healthy", reason="used 2 of 16.", advice="Raise alpha."
    )


def evidence(layer: str = "blocks.0.mixer", step: int = 90, **fields: Any) -> Evidence:
    """A layer that forgets by choice, by the loss; `fields` replace its own."""
    values: dict[str, Any] = {
        "basis": "loss",
        "batches": 8,
        "base": 8.0,
        "m50": 1.0,
        "m90": 2.0,
        "cut": 4.0,
        "m50_error": 0.25,
        "far_share_ratio": 0.125,
        "outcome": "by_choice",
        "reason": "the loss of 8 changes by +1 with half the decay.",
    }
    return Evidence(step=step, layer=layer, **{**values, **fields})


def state_evidence(layer: str = "blocks.0.mixer", step: int = 90) -> StateEvidence:
    """A state that is too small, by the loss."""
    changes = {"base": 4.0, "quarter": 1.0, "half": 2.0, "whole": 8.0}
    return StateEvidence(step=step, layer=layer, basis="loss", batches=8, outcome="needed", reason="seen", **changes)


def examined(layer: str = "blocks.0.mixer", found: Evidence | None = None, step: int = 100) -> Finding:
    """A finding on evidence, of a layer that forgets by choice unless `found` says otherwise."""
    found = evidence(layer, step) if found is None else found
    condition: Condition = "forgets_by_choice" if found.outcome == "by_choice" else "collapsed"
    fields = {"condition": condition, "evidence": found}
    return finding(layer, step).model_copy(update=fields)


def action(layer: str = "blocks.0.mixer", step: int = 100, **fields: Any) -> Action:
    """A regularizer that has just been attached; `fields` replace its own."""
    values: dict[str, Any] = {
        "action": "pull_to_identity",
        "outcome": "applied",
        "finding": "used 2 of 16.",
        "message": "regularizer attached",
        "strength": 0.5,
        "utilization_before": 0.125,
        "retention_before": 0.5,
    }
    return Action(step=step, layer=layer, **{**values, **fields})


def measurement(step: int = 100, layers: tuple[str, ...] = PLAIN_LAYERS, **fields: Any) -> Measurement:
    values: dict[str, Any] = {
        "timestamp_seconds": 1_000_000.0 + step,
        "readings": tuple(reading(layer, step) for layer in layers),
        "conditions": dict.fromkeys(layers, "healthy"),
        "metrics": {"loss": 0.5},
        "overhead_ratio": 0.004,
        "interval_steps": 100,
    }
    return Measurement(step=step, **{**values, **fields})


def run_info(layers: tuple[str, ...] = PLAIN_LAYERS, **fields: Any) -> RunInfo:
    values: dict[str, Any] = {
        "run_name": "demo",
        "model": "Net",
        "layers": tuple(LayerInfo(name=name, module="Mixer", supported=True) for name in layers),
        "versions": {"ess_monitor": "0.1.0", "torch": "2.5.0"},
        "thresholds": {"collapsed.upper": 0.2, "saturated.lower": 0.9},
        "start_timestamp_seconds": 1_000_000.0,
        "overhead_budget_ratio": 0.01,
    }
    return RunInfo(**{**values, **fields})


def snapshot(status: RunStatus = "running", **fields: Any) -> Snapshot:
    """The counters of a run that has just begun; `fields` replace its own."""
    empty = HistogramData(bounds=(0.001, 0.01, 0.1), counts=(0, 0, 0))
    values: dict[str, Any] = {
        "last_step": 0,
        "steps_total": 0,
        "last_step_timestamp_seconds": 0.0,
        "last_measurement_timestamp_seconds": 0.0,
        "step_seconds": empty,
        "overhead_seconds": dict.fromkeys(PHASES, empty),
        "overhead_ratio": 0.0,
        "interval_steps": 100,
        "measurements_total": {},
        "readings": {},
        "conditions": {},
        "condition_changes_total": {},
        "nonfinite_total": {},
        "interventions_total": {},
        "interventions_active": {},
        "intervention_budget_remaining": 6,
        "last_intervention_timestamp_seconds": {},
        "autopilot_enabled": False,
        "export_errors_total": {},
        "export_dropped_total": {},
        "export_queue_length": {},
    }
    return Snapshot(status=status, **{**values, **fields})


def threads_of_ours() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("ess-monitor")}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class RecordingExporter:
    """Notes every call; `on_export` may raise, block or do anything else a sink does."""

    def __init__(
        self, name: str = "recording", *, inline: bool = False, on_export: Callable[[Measurement], None] | None = None
    ) -> None:
        self.name = name
        self.inline = inline
        self.calls: list[str] = []
        self.steps: list[int] = []
        self.threads: set[str] = set()
        self._on_export = on_export

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        self.calls.append("start")

    def export(self, measurement: Measurement) -> None:
        self.calls.append("export")
        self.threads.add(threading.current_thread().name)
        if self._on_export is not None:
            self._on_export(measurement)
        self.steps.append(measurement.step)

    def close(self, status: RunStatus) -> None:
        self.calls.append(f"close {status}")
