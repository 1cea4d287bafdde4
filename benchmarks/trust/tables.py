"""Turns verdicts into tables, for the terminal and in Markdown."""

from __future__ import annotations

from typing import Any

from benchmarks.report import Result
from benchmarks.trust.verdict import HalfVerdict

TITLES = {"held_out": "held-out half", "seen": "seen half"}


def tables(verdicts: list[HalfVerdict]) -> list[Result]:
    """Return two tables for each half: by mode and by kind, with the misses named below."""
    shown = []
    for verdict in verdicts:
        title = TITLES[verdict.split]
        notes = [*verdict.misses, *(f"left out or doubtful: {text}" for text in verdict.left_out)]
        digests = ", ".join(sorted(verdict.thresholds))
        shown.append(Result(f"The autopilot on the {title} (thresholds {digests})", verdict.rows))
        shown.append(Result(f"By kind, {title}", verdict.kinds, notes or ["no misses"]))
    return shown


def protocol(verdicts: list[HalfVerdict]) -> str:
    """Return what the results say of the order in which halves and thresholds came."""
    digests = {digest for verdict in verdicts for digest in verdict.thresholds}
    rule = "Thresholds, settings and the noise of each kind are fixed before the held-out half is run."
    if {verdict.split for verdict in verdicts} != set(TITLES):
        return f"{rule} Only one half has results."
    if len(digests) == 1:
        return f"{rule} Both halves were run with the same thresholds ({digests.pop()})."
    return f"{rule} NOT SO HERE: the results are of different thresholds ({', '.join(sorted(digests))})."


def markdown(verdicts: list[HalfVerdict]) -> str:
    """Return the tables and the misses in Markdown."""
    parts = []
    for verdict in verdicts:
        title = TITLES[verdict.split]
        parts.append(
            _table({title if name == "mode" else name: value for name, value in row.items()} for row in verdict.rows)
        )
        parts.append(_table(verdict.kinds))
        named = [*verdict.misses, *verdict.left_out]
        parts.append(f"Misses and runs left out, {title}:\n\n" + "\n".join(f"- {text}" for text in named or ["none"]))
    return "\n\n".join([*parts, protocol(verdicts)]) + "\n"


def _table(rows: Any) -> str:
    rows = list(rows)
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row[column]) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
