"""From the changes of the loss to an outcome: is a layer that remembers little treatable, or does the loss want it so?

Two kinds of collapse are seen. A loud one squeezes the past through few slow states: without the past the loss rises,
and remembering more costs nothing. A silent one lets nothing of the past through: neither change reaches the loss. A
task that needs no past looks the same, so that the diagnosis calls it a collapse only where the task is unsolved.
"""

from __future__ import annotations

import math
from typing import Literal

from ess_monitor.evidence.config import EvidenceConfig
from ess_monitor.records import Changes, Evidence


def add_changes(one: Changes, other: Changes) -> Changes:
    """Return the sums over the batches of both.

    Raises:
        ValueError: they are of two kinds.

    Example:
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

    Example:
        >>> changes = Changes(batches=4, base=8.0, m50=0.004, m90=0.04, cut=0.8, m50_squared=1e-5)
        >>> weigh("mixer", 1500, changes, EvidenceConfig()).outcome
        'loud'
        >>> weigh("mixer", 1500, Changes(4, 8.0, m50=0.2, m90=0.9, cut=0.8), EvidenceConfig()).outcome
        'by_choice'
    """
    count = changes.batches
    base, m50, m90, cut = (total / count for total in (changes.base, changes.m50, changes.m90, changes.cut))
    variance = max(0.0, changes.m50_squared / count - m50 * m50)
    is_kl = changes.kind == "outputs"
    outcome, reason = (_by_kl if is_kl else _by_loss)(config, base, m50, m90, cut)
    return Evidence(
        step=step,
        layer=layer,
        basis="kl" if is_kl else "loss",
        batches=count,
        base=None if is_kl else base,
        m50=m50,
        m90=m90,
        cut=cut,
        m50_error=math.sqrt(variance / (count - 1)) if count > 1 else 0.0,
        far_share_ratio=far_share_ratio,
        outcome=outcome,
        reason=f"{reason} ({count} batches run again)",
    )


_Outcome = Literal["loud", "silent", "by_choice", "unclear"]


def _by_loss(config: EvidenceConfig, base: float, m50: float, m90: float, cut: float) -> tuple[_Outcome, str]:
    # A solved task can have a loss of 0: then every change is large against it, and none is silent.
    scale = abs(base)
    seen = (
        f"the loss of {base:.4g} changes by {m50:+.3g} with half the decay, by {m90:+.3g} with a tenth, and by "
        f"{cut:+.3g} without the past"
    )
    if cut >= config.cut_ratio * scale and cut > 0:
        if m50 < config.m50_share * cut:
            return "loud", f"{seen}: it needs the past, and remembering more costs it nothing"
        return "by_choice", f"{seen}: remembering more costs it {m50 / cut:.0%} of what the past is worth"
    silent = config.silent_ratio * scale
    if abs(cut) < silent and abs(m90) < silent:
        return "silent", f"{seen}: nothing of the past reaches it"
    if m50 > 0 and m90 >= silent:
        return "by_choice", f"{seen}: it prefers the forgetting"
    return "unclear", f"{seen}: neither a preference nor its absence can be seen"


def _by_kl(config: EvidenceConfig, base: float, m50: float, m90: float, cut: float) -> tuple[_Outcome, str]:
    seen = (
        f"the outputs move by {m50:.3g} nats with half the decay, by {m90:.3g} with a tenth, and by {cut:.3g} without "
        "the past"
    )
    if m90 < config.kl_silent:
        return "silent", f"{seen}: what the layer remembers does not reach them"
    if cut > 0 and m50 < config.kl_share * cut:
        return "loud", f"{seen}: they need the past, and remembering more hardly changes them"
    return "by_choice", f"{seen}: they depend on the forgetting"
