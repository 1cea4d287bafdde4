"""What travels between the rooms: frozen, serializable, versioned.

Records know nobody: this module imports pydantic and nothing of ours. Every room speaks in these types, so that the
diagnosis never sees an exporter and an exporter never sees a model. `record.model_dump(mode="json")` is what the event
log writes; `Record.model_validate(...)` reads it back.

Units: sizes (`state_capacity`, `effective_size`, ...) are state dimensions; `_ratio` is 0..1 unless said otherwise;
`_seconds` are seconds; `_timestamp_seconds` are seconds since the Unix epoch; steps are optimizer steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1
"""Version of the serialized records; raised when a field changes its meaning or disappears."""

Status = Literal["ok", "nonfinite", "too_short", "timed_out", "dropped", "failed"]
"""How a reading ended. Only `ok` carries sizes that mean something; every other status keeps the reason."""

Condition = Literal["unknown", "healthy", "forgets_by_choice", "saturated", "collapsed"]
"""What the diagnosis says of a layer. Everything else about a condition is in `CONDITION_INFO`."""

RunStatus = Literal["starting", "running", "finished", "failed"]
"""Where a run is."""

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
    "saturated": ConditionInfo("yellow", True, "StateSaturated", "is saturated", "The state is full."),
    "collapsed": ConditionInfo(
        "red", True, "StateCollapsed", "has collapsed", "The state is not used, and the loss gains nothing by that."
    ),
}
"""Every condition, in the order of severity. A new one is a name in `Condition`, a line here and a rule."""


class Record(BaseModel):
    """Base of all records: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LayerInfo(Record):
    """One sequence-mixing layer as `describe` sees it, before anything has run."""

    name: str
    """Dotted module path in the model."""
    module: str
    """Class of the module."""
    supported: bool
    """True when the layer can be measured."""
    reason: str = ""
    """Why not, and what to do about it, when `supported` is false."""
    operator: str = ""
    """Kind of operator, a class name of `ess_monitor.ess`."""
    state_capacity: int | None = None
    """TSS: state dimensions per channel. None where it grows with the position, or is known after a forward pass."""
    capacity_grows: bool = False
    """True where TSS is not a design choice but grows with the position (softmax attention)."""
    channels: int = 0
    """How many independent operators (heads or channels) the layer applies; 0 where a forward pass must tell."""
    uninformative: str = ""
    """Why ESS says little of this kind of layer, which is therefore measured and not diagnosed; empty elsewhere."""
    handles: tuple[str, ...] = ()
    """What an intervention may act on, as `knob: parameter names`; empty where there is nothing to act on."""


class Reading(Record):
    """One layer measured at one step. Sizes are averages over samples, channels and positions unless said otherwise."""

    step: int
    layer: str
    status: Status
    message: str = ""
    """What happened, when `status` is not ok."""
    operators: int = 0
    """How many operators (samples x heads or channels) were averaged."""
    length: int = 0
    """Tokens per sequence after the length crop."""
    positions: tuple[int, ...] = ()
    """Positions i at which H_i = T[i:, :i] was measured."""
    tolerance: float = 1e-3
    """tau of the tolerance-ESS."""
    state_capacity: float | None = None
    """TSS per channel, averaged over the positions."""
    capacity_grows: bool = False
    """True where TSS is not a design choice but grows with the position (softmax attention)."""
    attainable_size: float | None = None
    """Mean over positions of min(TSS, i, length - i): what the geometry of H_i allows at most."""
    effective_size: float | None = None
    """Tolerance-ESS per channel."""
    entropy_size: float | None = None
    """Entropy-ESS per channel."""
    total_effective_size: float | None = None
    """Tolerance-ESS summed over the layer's independent operators (heads or channels), averaged over the rest. The
    paper's total ESS of softmax attention counts every value channel of a head and so is larger by their number."""
    total_state_capacity: float | None = None
    """TSS summed over the layer's independent operators."""
    minimum_effective_size: float | None = None
    """Smallest tolerance-ESS over samples and channels at the middle position (appendix C.6)."""
    effective_size_lower: float | None = None
    """Certified lower bound (interlacing) of the mean tolerance-ESS from the first to the last measured position."""
    effective_size_upper: float | None = None
    """Certified upper bound of the same mean."""
    utilization_ratio: float | None = None
    """effective_size / state_capacity, 0..1."""
    retention_ratio: float | None = None
    """Tolerance-ESS against that of the same operator with A := I. Below 1 the decay costs memory. None: no decay."""
    mean_decay: float | None = None
    """Mean of A's diagonal, 0..1 for a stable recurrence. None where there is no A."""
    decay_product_norm: float | None = None
    """Frobenius norm of the product of A over the sequence. None where there is no A."""
    far_share_ratio: float | None = None
    """Share of a token's output that comes from afar: ||T[p+d:, :p]||_F / ||T[p+d:, :]||_F at the position p nearest
    the middle, with d = length // 8, over all measured operators; 0..1. None where d is 0 or no row is left."""
    per_head: tuple[float, ...] = ()
    """Tolerance-ESS of each measured head or channel."""
    heads: tuple[int, ...] = ()
    """Which heads or channels were measured."""
    per_position: tuple[float, ...] = ()
    """Tolerance-ESS at each of `positions`."""
    spectrum: tuple[float, ...] = ()
    """Singular values of H_i at the position nearest the middle, descending: for each rank the geometric mean over
    samples and heads, 0 where all are rounding. At most 32; of more, evenly spaced ones with the first and the last."""
    spectrum_ranks: tuple[int, ...] = ()
    """Which singular values `spectrum` holds; 1 is the largest."""
    ranks: int = 1
    """How many ranks' data the sizes and ratios that are decided on are means over. 1: a process measured alone."""
    utilization_min_ratio: float | None = None
    """Smallest utilization over those ranks. None where a process measured alone."""
    worst_rank: int | None = None
    """The rank it was seen on."""


def layer_title(name: str) -> str:
    """Return the name of a layer as it is shown. The model itself has none, and an empty label counts as missing.

    >>> layer_title("blocks.0.mixer"), layer_title("")
    ('blocks.0.mixer', 'root')
    """
    return name or "root"


def condition_title(condition: Condition) -> str:
    """Return the name of a condition as it is shown: "forgets by choice"."""
    return condition.replace("_", " ")


class Evidence(Record):
    """What the decay of one layer does to the loss: the same batches, run again with another A and without gradients.

    A change is `loss(with another A) - loss(with A)`, a mean over batches and ranks; above 0, the loss prefers A. Where
    there is no loss to replay, the change is KL(outputs with A || outputs with another A), in nats per output.
    """

    step: int
    """Of the sample that came with it: the first one after the last of the batches."""
    layer: str
    basis: Literal["loss", "kl"]
    """What was compared."""
    batches: int
    """Batches run again, on all ranks together."""
    base: float | None = None
    """Loss with A as it is; None by KL."""
    m50: float
    """Change with A^0.5: the state remembers more, its log decay is half."""
    m90: float
    """Change with A^0.1: the state remembers nearly all, its log decay is a tenth."""
    cut: float
    """Change with A = 0: the state forgets everything but the present token."""
    m50_error: float = 0.0
    """Standard error of `m50` over the batches."""
    far_share_ratio: float | None = None
    """`Reading.far_share_ratio` of the measurement that asked for the evidence."""
    outcome: Literal["loud", "silent", "by_choice", "unclear"]
    """loud: a collapse: the past matters, and remembering more costs nothing. silent: nothing of the past reaches the
    loss; a collapse if the task is unsolved. by_choice: the loss prefers the forgetting. unclear: none of these."""
    reason: str
    """The outcome in plain words, with the numbers and thresholds."""


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
    evidence: Evidence | None = None
    """What the loss says of the layer's forgetting, where it was asked."""


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
    findings: tuple[Finding, ...] = ()
    actions: tuple[Action, ...] = ()
    metrics: dict[str, float] = {}
    """Metrics of the training loop at that step (loss, accuracy, ...)."""
    overhead_ratio: float = 0.0
    """Measured cost of the monitor so far, as a share of the training time."""
    interval_steps: int = 0
    """Steps until the next sample, after the overhead budget has stretched it."""


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
    start_timestamp_seconds: float = 0.0
    overhead_budget_ratio: float = 0.0


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


class Snapshot(Record):
    """The run's counters at one moment: what a scrape shows. Cut under one lock, so that it is consistent."""

    status: RunStatus
    last_step: int
    steps_total: int
    last_step_timestamp_seconds: float
    last_measurement_timestamp_seconds: float
    step_seconds: HistogramData
    overhead_seconds: dict[Phase, HistogramData]
    overhead_ratio: float
    interval_steps: int
    measurements_total: dict[Outcome, int]
    readings: dict[str, Reading]
    """Latest reading with status ok, per layer; a layer without one is absent."""
    conditions: dict[str, Condition]
    evidence: dict[str, Evidence] = {}
    """Latest evidence, per layer; a layer that was never examined is absent. Empty in logs of before it was written."""
    condition_changes_total: dict[Condition, int]
    nonfinite_total: dict[str, int]
    interventions_total: dict[ActionKind, dict[ActionOutcome, int]]
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


ChangeKind = Literal["loss", "outputs", "trial"]
"""What changes are of. loss, outputs: of these, with another decay. trial: of the loss, with the gate from before a
treatment; only `m50` is used."""
CHANGE_KINDS: tuple[ChangeKind, ...] = get_args(ChangeKind)


class Changes(NamedTuple):
    """Holds sums over batches that were run again with another decay of one layer; the terms of `Evidence`."""

    batches: int = 0
    """0: none could be run again."""
    base: float = 0.0
    m50: float = 0.0
    m90: float = 0.0
    cut: float = 0.0
    m50_squared: float = 0.0
    """Sum of the squares of each batch's `m50`."""
    kind: ChangeKind = "loss"


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
