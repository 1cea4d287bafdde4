"""From the changes of the loss to an outcome.

Is a layer that remembers little treatable, or does the loss want it so? Two kinds of collapse are seen. A loud one
squeezes what is far away through few slow states: without the past the loss rises, and remembering more costs nothing.
A silent one lets nothing of the past through: neither change reaches the loss. A task that needs no past looks the
same, also where its metric has a target that no model reaches, so that the diagnosis calls such a layer unused.

A layer whose output comes from nearby is none of these. Its loss may gain as little by remembering more, because there
is nothing more to gain.

Is a full state too small, or does the loss need no more? What a larger state would gain is not seen without training
one. What the last dimensions of the present one are worth is: where their loss costs little, more of them gain little.
"""

from __future__ import annotations

from typing import Literal

from ess_monitor.evidence.config import EvidenceConfig
from ess_monitor.records import Changes, Evidence, StateEvidence


def add_changes(one: Changes, other: Changes) -> Changes:
    """Return the sums over the batches of both.

    Raises:
        ValueError: they are of two kinds.

    Examples:
        >>> add_changes(Changes(1, 2.0, 0.5, 1.0, 4.0, 0.25), Changes(1, 3.0, 0.5, 1.0, 4.0, 0.25)).base
        5.0
    """
    if one.batches and other.batches and one.kind != other.kind:
        raise ValueError(f"changes of {one.kind} and {other.kind} do not add up")
    sums = (a + b for a, b in zip(one[:-1], other[:-1], strict=True))
    return Changes(*sums, kind=other.kind if other.batches else one.kind)  # type: ignore[misc, arg-type]


def weigh(
    layer: str, step: int, changes: Changes, config: EvidenceConfig, far_share_ratio: float | None = None
) -> Evidence:
    """Return the evidence on one layer.

    Args:
        layer: its name.
        step: of the sample that came with it.
        changes: sums over one batch at least.
        config: thresholds.
        far_share_ratio: of the layer's reading.

    Examples:
        >>> changes = Changes(batches=4, base=8.0, first=0.004, second=0.04, third=0.8)
        >>> weigh("mixer", 1500, changes, EvidenceConfig(), far_share_ratio=0.6).outcome
        'loud'
        >>> weigh("mixer", 1500, changes, EvidenceConfig(), far_share_ratio=0.001).outcome
        'by_choice'
        >>> weigh("mixer", 1500, Changes(4, 8.0, first=0.2, second=0.9, third=0.8), EvidenceConfig()).outcome
        'by_choice'
    """
    base, m50, m90, cut = _means(changes)
    is_kl = changes.kind == "outputs"
    outcome, reason = _by_kl(config, m50, m90, cut) if is_kl else _by_loss(config, far_share_ratio, base, m50, m90, cut)
    if outcome == "loud" and far_share_ratio is not None and far_share_ratio < config.far_share_ratio:
        near = (
            f"only {far_share_ratio:.2g} of what the layer puts out comes from afar, below {config.far_share_ratio:g}"
        )
        outcome, reason = "by_choice", f"{reason}, but {near}: what is needed is near"
    return Evidence(
        step=step,
        layer=layer,
        basis="kl" if is_kl else "loss",
        batches=changes.batches,
        base=None if is_kl else base,
        m50=m50,
        m90=m90,
        cut=cut,
        m50_error=changes.first_error,
        far_share_ratio=far_share_ratio,
        outcome=outcome,
        reason=f"{reason} ({changes.batches} batches run again)",
    )


def weigh_state(
    layer: str, step: int, changes: Changes, config: EvidenceConfig, spectrum_end_ratio: float | None = None
) -> StateEvidence:
    """Return the evidence on the size of one layer's state.

    Args:
        layer: its name.
        step: of the sample that came with it.
        changes: sums over one batch at least, with a smaller state.
        config: thresholds.
        spectrum_end_ratio: of the layer's reading.

    Examples:
        >>> changes = Changes(batches=4, base=8.0, first=1.2, second=3.0, third=9.0, kind="state_loss")
        >>> weigh_state("mixer", 1500, changes, EvidenceConfig()).outcome
        'needed'
        >>> changes = Changes(batches=4, base=8.0, first=0.01, second=0.4, third=9.0, kind="state_loss")
        >>> weigh_state("mixer", 1500, changes, EvidenceConfig()).outcome
        'spare'
    """
    base, quarter, half, whole = _means(changes)
    is_kl = changes.kind == "state_outputs"
    line = config.state_kl if is_kl else config.state_ratio * abs(base)
    needed = quarter >= line and quarter > 0
    if is_kl:
        seen = f"the outputs move by {quarter:.3g} nats without a quarter of the state dimensions"
    else:
        seen = f"the loss of {base:.4g} changes by {quarter:+.3g} without a quarter of the state dimensions"
    side, meaning = ("at or above", "needs them all") if needed else ("below", "needs no more of them")
    return StateEvidence(
        step=step,
        layer=layer,
        basis="kl" if is_kl else "loss",
        batches=changes.batches,
        base=None if is_kl else base,
        quarter=quarter,
        half=half,
        whole=whole,
        quarter_error=changes.first_error,
        spectrum_end_ratio=spectrum_end_ratio,
        outcome="needed" if needed else "spare",
        reason=f"{seen}, {side} {line:.3g}: the layer {meaning} ({changes.batches} batches run again)",
    )


def _means(changes: Changes) -> tuple[float, float, float, float]:
    """Return the means of base, first, second and third change."""
    sums = changes.base, changes.first, changes.second, changes.third
    base, first, second, third = (total / changes.batches for total in sums)
    return base, first, second, third


_Outcome = Literal["loud", "silent", "by_choice", "unclear"]


def _by_loss(
    config: EvidenceConfig, far_share_ratio: float | None, base: float, m50: float, m90: float, cut: float
) -> tuple[_Outcome, str]:
    # A solved task can have a loss of 0: then every change is large against it, and none is silent.
    scale = abs(base)
    m50_share = config.m50_share if far_share_ratio is None else config.far_m50_share
    seen = (
        f"the loss of {base:.4g} changes by {m50:+.3g} with half the decay, by {m90:+.3g} with a tenth, and by "
        f"{cut:+.3g} without the past"
    )
    if cut >= config.cut_ratio * scale and cut > 0:
        if m50 >= m50_share * cut:
            return "by_choice", f"{seen}: remembering more costs it {m50 / cut:.0%} of what the past is worth"
        if m50 >= config.m50_ratio * scale and m50 > 0:
            return "by_choice", f"{seen}: remembering more costs much of what little loss there is"
        return "loud", f"{seen}: it needs the past, and remembering more costs it nothing"
    silent = config.silent_ratio * scale
    if abs(cut) < silent and abs(m90) < silent:
        return "silent", f"{seen}: nothing of the past reaches it"
    if m50 > 0 and m90 >= silent:
        return "by_choice", f"{seen}: it prefers the forgetting"
    return "unclear", f"{seen}: neither a preference nor its absence can be seen"


def _by_kl(config: EvidenceConfig, m50: float, m90: float, cut: float) -> tuple[_Outcome, str]:
    seen = (
        f"the outputs move by {m50:.3g} nats with half the decay, by {m90:.3g} with a tenth, and by {cut:.3g} without "
        "the past"
    )
    if m90 < config.kl_silent:
        return "silent", f"{seen}: what the layer remembers does not reach them"
    if cut > 0 and m50 < config.kl_share * cut:
        return "loud", f"{seen}: they need the past, and remembering more hardly changes them"
    return "by_choice", f"{seen}: they depend on the forgetting"
