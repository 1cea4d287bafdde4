"""Formats findings and actions as Markdown for TensorBoard's text page; a layer's name never becomes markup."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ess_monitor.exporters.evidence import evidence_rows
from ess_monitor.records import Action, Finding, condition_title, layer_title

# Everything that Markdown or HTML may take for syntax inside a line. An underscore inside a word is not syntax.
_SYNTAX = re.compile(r"[^\w\s.,;:%()'\-=/?]|(?<![^\W_])_|_(?![^\W_])")
_COLUMNS = ("step", "layer", "action", "strength", "before", "after", "outcome", "message")


def escape(text: str) -> str:
    """Return `text` as one line that Markdown shows as it is: syntax becomes character references, also in tables.

    >>> escape("A->I | on blocks.0.mixer")
    'A-&#62;I &#124; on blocks.0.mixer'
    >>> escape("__init__ of q_proj")
    '&#95;&#95;init&#95;&#95; of q_proj'
    """
    line = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split()))
    return _SYNTAX.sub(lambda match: f"&#{ord(match.group())};", line)


def finding_markdown(finding: Finding) -> str:
    """Format a finding as paragraphs: what changed, why, what to do, and a table of the evidence where there is any."""
    layer, before, after = escape(layer_title(finding.layer)), finding.previous, finding.condition
    paragraphs = [f"**{layer}**: {condition_title(before)} → **{condition_title(after)}**", escape(finding.reason)]
    if finding.advice:
        paragraphs.append(f"*{escape(finding.advice)}*")
    if finding.evidence is not None:
        rows = (f"| {escape(name)} | {escape(value)} |" for name, value in evidence_rows(finding.evidence))
        paragraphs.append("\n".join([f"| evidence | step {finding.evidence.step} |", "|---|---|", *rows]))
    return "\n\n".join(paragraphs)


def action_table(actions: Iterable[Action]) -> str:
    """Format actions as a table with one row each; `before` and `after` are utilization.

    Examples:
        >>> from ess_monitor.records import Action
        >>> done = Action(step=7, layer="mixer", action="pull_to_identity", outcome="applied", finding="collapsed",
        ...               message="attached", strength=0.5, utilization_before=0.125)
        >>> print(action_table([done]))
        | step | layer | action | strength | before | after | outcome | message |
        |---|---|---|---|---|---|---|---|
        | 7 | mixer | pull_to_identity | 0.5 | 12.5% | - | applied | attached |
    """
    rows = [_COLUMNS, *(_cells(action) for action in actions)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(_COLUMNS), *lines[1:]])


def _cells(action: Action) -> tuple[str, ...]:
    return (
        str(action.step),
        escape(layer_title(action.layer)),
        action.action,
        "-" if action.strength is None else f"{action.strength:g}",
        _percent(action.utilization_before),
        _percent(action.utilization_after),
        action.outcome,
        escape(action.message),
    )


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1%}"
