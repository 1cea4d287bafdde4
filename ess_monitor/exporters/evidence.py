"""Writes counterfactual evidence down: as scalars, as fields of a log line, and as rows of a table."""

from __future__ import annotations

import math

from ess_monitor.records import Evidence, StateEvidence

AnyEvidence = Evidence | StateEvidence

CHANGES: tuple[str, ...] = ("m50", "m90", "cut")
"""Fields of `Evidence` that hold a change."""
STATE_CHANGES: tuple[str, ...] = ("quarter", "half", "whole")
"""Those of `StateEvidence`."""

_OUTCOMES: dict[str, dict[str, str]] = {
    "loss": {
        "needed": "too small: the loss needs the last state dimensions",
        "spare": "large enough: the loss hardly needs the last state dimensions",
        "loud": "collapse: the loss needs the past, and remembering more costs it nothing",
        "silent": "unused: nothing of the past reaches the loss",
        "by_choice": "by choice: the loss prefers the forgetting",
        "unclear": "unclear: neither a preference for the forgetting nor its absence can be seen",
    },
    "kl": {
        "needed": "too small: the outputs depend on the last state dimensions",
        "spare": "large enough: the outputs hardly depend on the last state dimensions",
        "loud": "collapse: the outputs need the past, and remembering more hardly changes them",
        "silent": "unused: what the layer remembers does not reach the outputs",
        "by_choice": "by choice: the outputs depend on the forgetting",
        "unclear": "unclear: neither can be seen in the outputs",
    },
}
"""Basis -> outcome -> the outcome in words."""


def changes_of(evidence: AnyEvidence) -> tuple[str, ...]:
    """Return the names of the changes that the evidence holds."""
    return CHANGES if isinstance(evidence, Evidence) else STATE_CHANGES


def evidence_ratios(evidence: AnyEvidence) -> dict[str, float]:
    """Return each change as a share of the base loss; nothing by KL, or where that loss is 0.

    Examples:
        >>> found = Evidence(step=7, layer="mixer", basis="loss", batches=8, base=4.0, m50=0.5, m90=1.0, cut=2.0,
        ...                  outcome="by_choice", reason="the loss prefers the forgetting")
        >>> evidence_ratios(found)
        {'m50_ratio': 0.125, 'm90_ratio': 0.25, 'cut_ratio': 0.5}
    """
    if evidence.basis != "loss" or not evidence.base:
        return {}
    ratios = {f"{change}_ratio": getattr(evidence, change) / abs(evidence.base) for change in changes_of(evidence)}
    return {name: ratio for name, ratio in ratios.items() if math.isfinite(ratio)}


def evidence_scalars(evidence: AnyEvidence) -> dict[str, float]:
    """Return each change by quantity: as a share of the base loss (`_ratio`), or by KL in nats (`_nats`)."""
    if evidence.basis == "kl":
        return {f"evidence_{change}_nats": getattr(evidence, change) for change in changes_of(evidence)}
    return {f"evidence_{name}": ratio for name, ratio in evidence_ratios(evidence).items()}


def evidence_fields(evidence: AnyEvidence) -> dict[str, str | int | float]:
    """Return the outcome and the numbers under short names, for a log line."""
    others = ("m50_error", "far_share_ratio", "quarter_error", "spectrum_end_ratio")
    names = ("step", "batches", "base", *changes_of(evidence), *others)
    numbers = {name: getattr(evidence, name, None) for name in names}
    known = {f"evidence_{name}": value for name, value in numbers.items() if value is not None}
    return {"evidence": evidence.outcome, "evidence_basis": evidence.basis, **known}


def evidence_rows(evidence: AnyEvidence) -> tuple[tuple[str, str], ...]:
    """Return name and value of everything that the evidence consists of, as text.

    Examples:
        >>> found = Evidence(step=7, layer="mixer", basis="loss", batches=8, base=4.0, m50=0.01, m90=0.5, cut=2.0,
        ...                  m50_error=0.002, outcome="loud", reason="it needs the past")
        >>> for name, value in evidence_rows(found)[:3]:
        ...     print(f"{name}: {value}")
        outcome: collapse: the loss needs the past, and remembering more costs it nothing
        compared: the loss, on 8 batches that were run again
        loss as it is: 4
    """
    is_kl, ratios = evidence.basis == "kl", evidence_ratios(evidence)
    compared = "the outputs (KL, in nats)" if is_kl else "the loss"

    def change(name: str, error: float = 0.0) -> str:
        sign, spread = "" if is_kl else "+", f" ± {error:.2g}" if error else ""
        share = f", {ratios[f'{name}_ratio']:+.2%} of the loss" if f"{name}_ratio" in ratios else ""
        return f"{getattr(evidence, name):{sign}.3g}{spread}{share}"

    common = (
        ("outcome", _OUTCOMES[evidence.basis][evidence.outcome]),
        ("compared", f"{compared}, on {evidence.batches} batches that were run again"),
        *((("loss as it is", f"{evidence.base:.4g}"),) if evidence.base is not None else ()),
    )
    if isinstance(evidence, StateEvidence):
        return (
            *common,
            ("change without a quarter of the state", change("quarter", evidence.quarter_error)),
            ("change without half of the state", change("half")),
            ("change without the state", change("whole")),
            ("last singular value / largest", _percent(evidence.spectrum_end_ratio)),
        )
    relation = f"{evidence.m50 / evidence.cut:.1%}" if evidence.cut > 0 else "–"
    return (
        *common,
        ("change with half the decay (m50)", change("m50", evidence.m50_error)),
        ("change with a tenth of the decay (m90)", change("m90")),
        ("change without the past (cut)", change("cut")),
        ("m50 / cut", relation),
        ("share of the output that comes from afar", _percent(evidence.far_share_ratio)),
    )


def _percent(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1%}"
