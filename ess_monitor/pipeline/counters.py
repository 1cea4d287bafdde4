"""Counts what happens in a run. A scrape shows one snapshot of it, cut under one lock so that it is consistent.

The training thread adds to it at every step, exporters read it from their own threads at any time.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ess_monitor.records import (
    ACTION_OUTCOMES,
    ACTIONS,
    CONDITIONS,
    OUTCOMES,
    PHASES,
    Action,
    ActionKind,
    ActionOutcome,
    Condition,
    Counts,
    Evidence,
    Finding,
    HealthData,
    HistogramData,
    Outcome,
    Phase,
    Reading,
    RunStatus,
    Snapshot,
    StateEvidence,
)

_STEP_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_LOCK_SECONDS = 0.5
"""Longest wait for the thread that counts, which takes microseconds unless a signal handler has interrupted it."""
_PHASE_BOUNDS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)


@dataclass
class _Histogram:
    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def data(self) -> HistogramData:
        cumulative, running = [], 0
        for count in self.counts[:-1]:
            running += count
            cumulative.append(running)
        return HistogramData(
            bounds=self.bounds,
            counts=tuple(cumulative),
            total_seconds=self.total,
            count=running + self.counts[-1],
        )


class _Counts:
    """Counts that only grow. Every name is there from the start."""

    def __init__(self, layers: tuple[str, ...]) -> None:
        self.steps = 0
        self.measurements: dict[Outcome, int] = dict.fromkeys(OUTCOMES, 0)
        self.changes: dict[Condition, int] = dict.fromkeys(CONDITIONS, 0)
        self.nonfinite: dict[str, int] = dict.fromkeys(layers, 0)
        self.interventions: dict[ActionKind, dict[ActionOutcome, int]] = {
            kind: dict.fromkeys(ACTION_OUTCOMES, 0) for kind in ACTIONS
        }

    def data(self) -> Counts:
        return Counts(
            steps_total=self.steps,
            measurements_total=dict(self.measurements),
            condition_changes_total=dict(self.changes),
            nonfinite_total=dict(self.nonfinite),
            interventions_total={kind: dict(counts) for kind, counts in self.interventions.items()},
        )


class RunCounters:
    """Counts what happens in a run, and once more what happens in this process: a resumed run has had others.

    Args:
        layers: names of the measured layers.
        wall_clock: seconds since the epoch.
    """

    def __init__(self, layers: Iterable[str], *, wall_clock: Callable[[], float] = time.time) -> None:
        names = tuple(layers)
        self._wall_clock = wall_clock
        self._lock = threading.RLock()  # a signal handler may take a snapshot while its thread counts
        self._status: RunStatus = "starting"
        self._run, self._process = _Counts(names), _Counts(names)
        self._last_step = 0
        self._last_step_at = 0.0
        self._last_measurement_at = 0.0
        self._step_seconds = _Histogram(_STEP_BOUNDS)
        self._overhead: dict[Phase, _Histogram] = {phase: _Histogram(_PHASE_BOUNDS) for phase in PHASES}
        self._overhead_ratio = 0.0
        self._interval_steps = 0
        self._readings: dict[str, Reading] = {}
        self._deferred = 0
        self._conditions: dict[str, Condition] = dict.fromkeys(names, "unknown")
        self._evidence: dict[str, Evidence] = {}
        self._state_evidence: dict[str, StateEvidence] = {}
        self._treatments: dict[ActionKind, int] = dict.fromkeys(ACTIONS, 0)
        self._budget = 0
        self._last_intervention_at: dict[ActionKind, float] = dict.fromkeys(ACTIONS, 0.0)
        self._autopilot_enabled = False

    def set_status(self, status: RunStatus) -> None:
        """Set the status of the run."""
        with self._lock:
            self._status = status

    def step(self, step: int, seconds: float | None) -> None:
        """Count an optimizer step; `seconds` is None for the first one, whose start was not seen."""
        now = self._wall_clock()
        with self._lock:
            if self._status == "starting":
                self._status = "running"
            self._last_step = step
            for counts in (self._run, self._process):
                counts.steps += 1
            self._last_step_at = now
            if seconds is not None:
                self._step_seconds.add(seconds)

    def spent(self, phase: Phase, seconds: float) -> None:
        """Add to the time that the monitor itself has spent in a phase."""
        with self._lock:
            self._overhead[phase].add(seconds)

    def overhead(self, ratio: float, interval_steps: int) -> None:
        """Set the measured share of the training time, and the interval that follows from it."""
        with self._lock:
            self._overhead_ratio = ratio
            self._interval_steps = interval_steps

    def measured(
        self,
        outcome: Outcome,
        readings: Iterable[Reading] = (),
        findings: Iterable[Finding] = (),
        conditions: Mapping[str, Condition] | None = None,
        evidence: Mapping[str, Evidence] | None = None,
        state_evidence: Mapping[str, StateEvidence] | None = None,
    ) -> None:
        """Count a sample that has come to its end; conditions and evidence are those of the diagnosis after it."""
        now, readings = self._wall_clock(), tuple(readings)
        broken = [reading.layer for reading in readings if reading.status == "nonfinite"]
        entered = [finding.condition for finding in findings]
        with self._lock:
            self._deferred = sum(reading.status == "deferred" for reading in readings)
            for reading in readings:
                if reading.status == "ok":
                    self._readings[reading.layer] = reading
                    self._last_measurement_at = now
            for counts in (self._run, self._process):
                counts.measurements[outcome] += 1
                for layer in broken:
                    counts.nonfinite[layer] = counts.nonfinite.get(layer, 0) + 1
                for condition in entered:
                    counts.changes[condition] += 1
            self._conditions.update(conditions or {})
            self._evidence.update(evidence or {})
            self._state_evidence.update(state_evidence or {})

    def autopilot(self, actions: Iterable[Action], active: Iterable[ActionKind], budget: int, enabled: bool) -> None:
        """Count what the autopilot did at this measurement, and set where it stands."""
        now = self._wall_clock()
        with self._lock:
            for action in actions:
                for counts in (self._run, self._process):
                    counts.interventions[action.action][action.outcome] += 1
                if action.outcome == "applied":
                    self._last_intervention_at[action.action] = now
            self._treatments = dict.fromkeys(ACTIONS, 0)
            for kind in active:
                self._treatments[kind] += 1
            self._budget, self._autopilot_enabled = budget, enabled

    def snapshot(
        self,
        export_errors: Mapping[str, int] | None = None,
        export_dropped: Mapping[str, int] | None = None,
        export_queue: Mapping[str, int] | None = None,
        health: HealthData | None = None,
    ) -> Snapshot:
        """Return all counters at one moment.

        Where a signal handler has interrupted the training inside of a count, and waits for this, they are those of
        that moment.
        """
        is_mine = self._lock.acquire(timeout=_LOCK_SECONDS)
        try:
            return Snapshot(
                **dict(self._run.data()),
                process=self._process.data(),
                status=self._status,
                last_step=self._last_step,
                last_step_timestamp_seconds=self._last_step_at,
                last_measurement_timestamp_seconds=self._last_measurement_at,
                step_seconds=self._step_seconds.data(),
                overhead_seconds={phase: histogram.data() for phase, histogram in self._overhead.items()},
                overhead_ratio=self._overhead_ratio,
                interval_steps=self._interval_steps,
                layers_deferred=self._deferred,
                readings=dict(self._readings),
                conditions=dict(self._conditions),
                evidence=dict(self._evidence),
                state_evidence=dict(self._state_evidence),
                interventions_active=dict(self._treatments),
                intervention_budget_remaining=self._budget,
                last_intervention_timestamp_seconds=dict(self._last_intervention_at),
                autopilot_enabled=self._autopilot_enabled,
                export_errors_total=dict(export_errors or {}),
                export_dropped_total=dict(export_dropped or {}),
                export_queue_length=dict(export_queue or {}),
                health=health or HealthData(),
            )
        finally:
            if is_mine:
                self._lock.release()

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of the run. Times and histograms are those of a process and start anew."""
        with self._lock:
            counts = self._run.data()
            return {
                "steps_total": counts.steps_total,
                "measurements": counts.measurements_total,
                "changes": counts.condition_changes_total,
                "nonfinite": counts.nonfinite_total,
                "last_intervention_at": dict(self._last_intervention_at),
                "interventions": counts.interventions_total,
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. What has been counted in this process stays."""
        with self._lock:
            run = self._run
            run.steps = int(state["steps_total"])
            run.measurements.update(state["measurements"])
            run.changes.update(state["changes"])
            run.nonfinite.update({k: v for k, v in state["nonfinite"].items() if k in run.nonfinite})
            self._last_intervention_at.update(state["last_intervention_at"])
            for kind, counts in state["interventions"].items():
                run.interventions[kind].update(counts)

    def resumed(
        self,
        step: int,
        conditions: Mapping[str, Condition],
        evidence: Mapping[str, Evidence],
        state_evidence: Mapping[str, StateEvidence],
    ) -> None:
        """Show where a resumed run stands, before it makes a step or measures anything."""
        with self._lock:
            self._last_step = step
            self._conditions.update(conditions)
            self._evidence.update(evidence)
            self._state_evidence.update(state_evidence)
