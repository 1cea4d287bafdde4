"""What passes between the packages: frozen, serializable, versioned.

This package imports pydantic and nothing of the others. They pass these types to each other, so that the diagnosis
never sees an exporter and an exporter never sees a model. `record.model_dump(mode="json")` is what the event
log writes; `Record.model_validate(...)` reads it back.

Units: sizes (`state_capacity`, `effective_size`, ...) are state dimensions; `_ratio` is 0..1 unless said otherwise;
`_seconds` are seconds; `_timestamp_seconds` are seconds since the Unix epoch; steps are optimizer steps.
"""

from __future__ import annotations

from ess_monitor.records.evidence import CHANGE_KINDS, ChangeKind, Changes, Evidence, StateEvidence
from ess_monitor.records.layers import LayerInfo, Reading, Record, layer_title
from ess_monitor.records.runs import Counts, HealthData, HistogramData, RunInfo, Snapshot
from ess_monitor.records.samples import Action, Finding, Measurement, SampleResult
from ess_monitor.records.terms import (
    ACTION_OUTCOMES,
    ACTIONS,
    COLOR_SCALE,
    CONDITION_INFO,
    CONDITIONS,
    MEASURED,
    OUTCOMES,
    PARTS,
    PHASES,
    RUN_STATUSES,
    ActionKind,
    ActionOutcome,
    Condition,
    ConditionInfo,
    Outcome,
    Part,
    Phase,
    RunStatus,
    Status,
    condition_title,
)

SCHEMA_VERSION = 1
"""Version of the serialized records; raised when a field changes its meaning or disappears."""

__all__ = [
    "ACTIONS",
    "ACTION_OUTCOMES",
    "CHANGE_KINDS",
    "COLOR_SCALE",
    "CONDITIONS",
    "CONDITION_INFO",
    "MEASURED",
    "OUTCOMES",
    "PARTS",
    "PHASES",
    "RUN_STATUSES",
    "SCHEMA_VERSION",
    "Action",
    "ActionKind",
    "ActionOutcome",
    "ChangeKind",
    "Changes",
    "Condition",
    "ConditionInfo",
    "Counts",
    "Evidence",
    "Finding",
    "HealthData",
    "HistogramData",
    "LayerInfo",
    "Measurement",
    "Outcome",
    "Part",
    "Phase",
    "Reading",
    "Record",
    "RunInfo",
    "RunStatus",
    "SampleResult",
    "Snapshot",
    "StateEvidence",
    "Status",
    "condition_title",
    "layer_title",
]
