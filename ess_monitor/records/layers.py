"""A layer as it is found and as it is measured; the base of all records."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from ess_monitor.records.terms import Status


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
    sample_seconds: float | None = None
    """Seconds of one core that its measurement takes in a sample, estimated from shapes; right within a factor of about
    two. None where they are not known, as in a run's description."""
    sample_bytes: int | None = None
    """Bytes that a sample holds of it, estimated likewise."""
    handles: tuple[str, ...] = ()
    """What an intervention may act on, as `knob: parameter names`; empty where there is nothing to act on."""


class Reading(Record):
    """One layer measured at one step. Sizes are averages over samples, channels and positions unless said otherwise."""

    step: int
    layer: str
    status: Status
    message: str = ""
    """What happened, when `status` is not ok."""
    basis: Literal["operator", "jacobian"] = "operator"
    """jacobian: sizes are ranks of d y[i:] / d u[:i], all channels together: the layer linearized at this input."""
    is_lower_bound: bool = False
    """True where the sizes may be larger than what was found."""
    products: int | None = None
    """Jacobian products that were computed, each the cost of some two or three forward passes of the layer."""
    operators: int = 0
    """How many operators (samples x heads or channels) were averaged."""
    length: int = 0
    """Tokens of a sequence after the length crop, without padding and without other sequences packed into the same row.
    Where lengths differ, those of the shortest sequence that was measured."""
    row_length: int = 0
    """Tokens of a row as the layer was given it. Of longer rows than `length` the first `length` tokens were seen, or
    those of one sequence; 0 where it is not known."""
    calls: int = 1
    """How often the layer was called in the forward pass (a block that is used several times). The first call is
    measured."""
    positions: tuple[int, ...] = ()
    """Positions i at which H_i = T[i:, :i] was measured, counted from the first token of the sequence. Where lengths
    differ, those in the shortest; in a longer one they are at the same shares of its length."""
    tolerance: float = 1e-3
    """tau of the tolerance-ESS."""
    tolerance_scale: Literal["absolute", "output"] = "absolute"
    """Against what tau is measured. absolute: singular values of H_i count above tau. output: T was divided by the
    norms of its rows before anything was counted, so that tau is a share of what the layer puts out at each token."""
    state_capacity: float | None = None
    """TSS per channel, averaged over the positions."""
    capacity_grows: bool = False
    """True where TSS is not a design choice but grows with the position (softmax attention)."""
    attainable_size: float | None = None
    """Mean over sequences and positions of min(TSS, i, length - i): what the geometry of H_i allows at most."""
    effective_size: float | None = None
    """Tolerance-ESS per channel, a mean over `positions`."""
    effective_size_at: tuple[tuple[float, float], ...] = ()
    """The same at other tolerances: pairs of tau and tolerance-ESS, from a hundredth to a hundred times `tolerance`."""
    entropy_size: float | None = None
    """Entropy-ESS per channel."""
    total_effective_size: float | None = None
    """Tolerance-ESS summed over the layer's independent operators (heads or channels), averaged over the rest. The
    paper's total ESS of softmax attention counts every value channel of a head and so is larger by their number."""
    total_state_capacity: float | None = None
    """TSS summed over the layer's independent operators."""
    minimum_effective_size: float | None = None
    """Smallest tolerance-ESS over samples and channels at the middle position (appendix C.6). To be compared with the
    entry of `per_position` there: `effective_size` is a mean over positions."""
    effective_size_between: float | None = None
    """Mean tolerance-ESS over *every* position from the first to the last measured one, interpolated linearly between
    these. The two bounds are of this mean; `effective_size`, of `positions` alone, may lie outside of them."""
    effective_size_lower: float | None = None
    """Certified lower bound (interlacing) of the mean over every position from the first to the last measured one."""
    effective_size_upper: float | None = None
    """Certified upper bound of the same mean."""
    utilization_ratio: float | None = None
    """effective_size / state_capacity, 0..1."""
    retention_ratio: float | None = None
    """Tolerance-ESS against that of the same operator with A := I. Below 1 the decay costs memory. None: no decay."""
    retention_step: int | None = None
    """Step of the sample that measured the operator with A := I. None: this one (`retention_every_n_samples`)."""
    mean_decay: float | None = None
    """Mean of A's diagonal, 0..1 for a stable recurrence. None where there is no A."""
    decay_product_norm: float | None = None
    """Frobenius norm of the product of A over the sequence. None where there is no A."""
    spectrum_end_ratio: float | None = None
    """Singular value number TSS of H_i over the largest, at the position nearest the middle: the geometric mean over
    samples and heads, 0..1. Near 0 the last state dimension hardly counts. None where H_i has fewer rows or columns."""
    far_share_ratio: float | None = None
    """Share of a token's output that comes from afar: ||T[p+d:, :p]||_F / ||T[p+d:, :]||_F at the position p nearest
    the middle, with d = length // 8, over all measured operators; 0..1. None where d is 0 or no row is left."""
    modulation_ratio: tuple[tuple[float, float], ...] = ()
    """State modulation: pairs of tau and 1 - ESS[e+1] / mean ESS[e-3..e] at separator tokens e, less the same at other
    tokens. 0 where separators are tokens like others. Empty where it is not asked for, or not known."""
    modulation_separators: int = 0
    """Separators at which it was measured, over all sequences. 0 where none of these held one."""
    modulation_message: str = ""
    """Why it cannot be measured; empty where it can, or is not asked for."""
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
