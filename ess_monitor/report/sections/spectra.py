"""Singular values of a layer at a few steps, as a figure and as numbers."""

from __future__ import annotations

from collections.abc import Sequence

from ess_monitor.records import Reading
from ess_monitor.report.components import ROWS_OF_A_TABLE, Table, cell, evenly, tolerance_title
from ess_monitor.report.figures import Figure, Series, line_figure
from ess_monitor.report.history import RunHistory


def chosen_spectra(history: RunHistory, layer: str) -> tuple[tuple[str, Reading], ...]:
    """Return at most four readings with a spectrum, by step, each with the reason why it was chosen.

    They are the first, the last, and between them the two around the first action that was applied to the layer, or
    the middle one where none was. The result is empty where the log has no spectra.
    """
    known = [reading for reading in history.ok(layer) if reading.spectrum]
    if not known:
        return ()
    chosen = {known[0].step: ("first", known[0])}
    applied = [action for action in history.actions if action.layer == layer and action.outcome == "applied"]
    if applied:
        step, name = applied[0].step, applied[0].action
        # The sample of a step is taken before the action of that step.
        for reading in [each for each in known if each.step <= step][-1:]:
            chosen.setdefault(reading.step, (f"before {name}", reading))
        for reading in [each for each in known if each.step > step][:1]:
            chosen.setdefault(reading.step, (f"after {name}", reading))
    else:
        middle = known[len(known) // 2]
        chosen.setdefault(middle.step, ("middle", middle))
    chosen.setdefault(known[-1].step, ("last", known[-1]))
    return tuple(chosen.values())


def spectra_figure(chosen: Sequence[tuple[str, Reading]]) -> Figure | None:
    """Draw the singular values by rank on a logarithmic axis, with the tolerance; None where all are 0."""
    series = [
        Series(_label(reason, reading), kind, [(float(rank), value) for rank, value in _pairs(reading) if value > 0])
        for kind, (reason, reading) in zip("abcd", chosen, strict=False)
    ]
    if not any(each.pairs for each in series):
        return None
    ranks = [float(rank) for _, reading in chosen for rank in reading.spectrum_ranks]
    tolerance, shown = chosen[-1][1].tolerance, tolerance_title(chosen[-1][1])
    limit = [(min(ranks), tolerance), (max(ranks), tolerance)] if tolerance > 0 else []
    lines = [*series, Series(f"tolerance {shown}: the ESS here counts the values above", "limit", limit)]
    title = "Singular values at the middle of the sequence, by rank"
    return line_figure(title, {"": lines}, x_label="rank", log_y=True)


def spectra_table(chosen: Sequence[tuple[str, Reading]], most: int = ROWS_OF_A_TABLE) -> Table | None:
    """Return the singular values as numbers, with a row for each of at most so many ranks; None without any."""
    columns = [dict(_pairs(reading)) for _, reading in chosen]
    ranks = sorted({rank for column in columns for rank in column})
    if not ranks:
        return None
    rows = tuple((str(rank), *(cell(column.get(rank)) for column in columns)) for rank in evenly(ranks, most))
    return Table("Singular values", ("rank", *(_label(reason, reading) for reason, reading in chosen)), rows)


def _pairs(reading: Reading) -> list[tuple[int, float]]:
    return list(zip(reading.spectrum_ranks, reading.spectrum, strict=False))


def _label(reason: str, reading: Reading) -> str:
    return f"step {reading.step}, {reason}"
