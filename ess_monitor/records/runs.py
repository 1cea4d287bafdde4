"""A run when it starts, and its counters at one moment."""

from __future__ import annotations

from ess_monitor.records.evidence import Evidence, StateEvidence
from ess_monitor.records.layers import LayerInfo, Reading, Record
from ess_monitor.records.terms import ActionKind, ActionOutcome, Condition, Outcome, Part, Phase, RunStatus


class RunInfo(Record):
    """Describes a run when it starts."""

    run_name: str
    model: str
    layers: tuple[LayerInfo, ...]
    """The layers that are measured, in model order."""
    strategy: str = "single"
    world_size: int = 1
    precision: str = "32"
    versions: dict[str, str] = {}
    thresholds: dict[str, float] = {}
    """`condition.bound` -> ratio, for the dashboards (for example `collapsed.upper`)."""
    diagnosis: dict[str, bool | int | float | str | None] = {}
    """Settings of the diagnosis by name (`warmup_steps`, `patience`, ...). Empty in older logs."""
    modulation_separators: tuple[int, ...] = ()
    """Token ids at which state modulation is measured. Empty where it is not, and in older logs."""
    start_timestamp_seconds: float = 0.0
    first_step: int = 0
    """Lowest step that the run may measure: above 0 where it goes on from a checkpoint. What an earlier process wrote
    from here on is overtaken. 0 in older logs."""
    overhead_budget_ratio: float = 0.0
    every_n_steps: int = 0
    """The shortest interval between two samples. 0 in older logs."""
    hyperparameters: dict[str, bool | int | float | str | None] = {}
    """Facts of the run that its user gave, by name (`kv_pairs`, `state_size`, `lr`, ...). Empty in older logs."""
    addresses: dict[str, str] = {}
    """Exporter -> where it serves (`prometheus` -> `http://127.0.0.1:9464/metrics`). Empty in older logs."""


class HistogramData(Record):
    """A cumulative histogram: `counts[k]` observations were <= `bounds[k]`; the last bound is infinity and implied."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total_seconds: float = 0.0
    count: int = 0


class HealthData(Record):
    """Lists what has failed in the monitor itself, and what has turned itself off because of it."""

    part_failures_total: dict[Part, int] = {}
    """Failures of each part, those of single layers and of the worker included; skipped samples of the agreement."""
    parts_off: tuple[Part, ...] = ()
    """Parts that are off for the rest of the run, after failures in a row."""
    layers_off: tuple[str, ...] = ()
    """Layers that are no longer measured, after failures in a row; their last sizes and conditions stay."""
    exporters_off: tuple[str, ...] = ()
    """Exporters that are off."""


class Counts(Record):
    """How often things have happened."""

    steps_total: int
    measurements_total: dict[Outcome, int]
    condition_changes_total: dict[Condition, int]
    nonfinite_total: dict[str, int]
    interventions_total: dict[ActionKind, dict[ActionOutcome, int]]


class Snapshot(Counts):
    """The run's counters at one moment: what a scrape shows. Cut under one lock, so that it is consistent.

    Its own counts are those of the run, over all processes that it was resumed in.
    """

    process: Counts | None = None
    """The same counts of this process alone, from 0 on. None in logs of before it was written."""
    status: RunStatus
    last_step: int
    last_step_timestamp_seconds: float
    last_measurement_timestamp_seconds: float
    step_seconds: HistogramData
    overhead_seconds: dict[Phase, HistogramData]
    overhead_ratio: float
    interval_steps: int
    layers_deferred: int = 0
    """Layers that the last sample had no time for. 0 in logs of before it was written."""
    readings: dict[str, Reading]
    """Latest reading with status ok, per layer; a layer without one is absent."""
    conditions: dict[str, Condition]
    evidence: dict[str, Evidence] = {}
    """Latest evidence, per layer; a layer that was never examined is absent. Empty in logs of before it was written."""
    state_evidence: dict[str, StateEvidence] = {}
    """The same of the size of the state."""
    interventions_active: dict[ActionKind, int]
    """Treatments under way."""
    intervention_budget_remaining: int
    last_intervention_timestamp_seconds: dict[ActionKind, float]
    """When each kind was last applied; 0 before."""
    autopilot_enabled: bool
    """True in mode auto."""
    export_errors_total: dict[str, int]
    export_dropped_total: dict[str, int]
    export_queue_length: dict[str, int]
    health: HealthData = HealthData()
    """Of the monitor itself. Empty in logs of before it was written."""

    @property
    def of_process(self) -> Snapshot:
        """The same with the counts of this process in place of those of the run."""
        return self if self.process is None else self.model_copy(update=dict(self.process))
