"""What one sampled step gave: its result, findings, actions, and the measurement that exporters receive."""

from __future__ import annotations

from dataclasses import dataclass, field

from ess_monitor.records.evidence import Changes, Evidence, StateEvidence
from ess_monitor.records.layers import Reading, Record
from ess_monitor.records.terms import ActionKind, ActionOutcome, Condition


class Finding(Record):
    """A layer's condition changed."""

    step: int
    layer: str
    condition: Condition
    previous: Condition
    reason: str
    """In plain words: what was seen, against which threshold, for how long."""
    advice: str = ""
    """What to do about it."""
    utilization_ratio: float | None = None
    retention_ratio: float | None = None
    metric: float | None = None
    """Task metric at that step, when one is given."""
    evidence: Evidence | StateEvidence | None = None
    """What the loss says of the layer's forgetting, or of the size of its state, where it was asked."""


class Action(Record):
    """Something the autopilot did, would have done, or refused to do."""

    step: int
    layer: str
    action: ActionKind
    outcome: ActionOutcome
    finding: str
    """What it answers, in plain words."""
    message: str
    """What was done and why, in plain words."""
    strength: float | None = None
    """lambda of `pull_to_identity`, the factor of `rescale_alpha`."""
    utilization_before: float | None = None
    """Utilization when the treatment of this layer began."""
    utilization_after: float | None = None
    """Utilization now; None where the action has only just been taken."""
    retention_before: float | None = None
    retention_after: float | None = None


class Measurement(Record):
    """Holds everything that one sampled step gave, as exporters receive it."""

    step: int
    timestamp_seconds: float
    readings: tuple[Reading, ...]
    conditions: dict[str, Condition]
    """Condition of every layer after this measurement."""
    unknown_reasons: dict[str, str] = {}
    """Why a layer's condition is unknown, for those whose is. Empty in older logs."""
    findings: tuple[Finding, ...] = ()
    actions: tuple[Action, ...] = ()
    metrics: dict[str, float] = {}
    """Metrics of the training loop at that step (loss, accuracy, ...)."""
    warnings: tuple[str, ...] = ()
    """What is wrong with the settings of the run, each said once: a task metric that is never given, for example. Empty
    in older logs."""
    overhead_ratio: float = 0.0
    """Measured cost of the monitor so far, as a share of the training time."""
    interval_steps: int = 0
    """Steps until the next sample, after the overhead budget has stretched it."""


@dataclass(frozen=True)
class SampleResult:
    """Readings and metrics of one sampled step."""

    step: int
    """Step of the sample."""
    readings: tuple[Reading, ...]
    metrics: dict[str, float] = field(default_factory=dict)
    nonfinite: frozenset[str] = frozenset()
    """Metrics that were NaN or infinite."""
    skipped: str = ""
    """Why the sample is not judged on any rank; empty where it is. Not part of a checkpoint."""
    changes: dict[str, Changes] = field(default_factory=dict)
    """Of layers for which evidence was asked, since the sample before."""
    slowness: dict[str, float] = field(default_factory=dict)
    """Of layers that had their turn: how many times as long as estimated from its shape the measurement took; 0 where
    that is not known."""
