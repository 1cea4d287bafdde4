"""Table of a study of many runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ess_monitor.analysis.tables.cells import add_caption, add_row
from ess_monitor.exporters.terminal.inspected import cell, plain_table

if TYPE_CHECKING:
    from rich.table import Table

    from ess_monitor.analysis.study_results import Correlation, CorrelationDifference, Study


def study_table(result: Study, title: str | None = None) -> Table:
    """Return the correlations and their differences, and below them the grid."""
    numbers = ("runs", f"r with {result.metric}", "95 %")
    table = plain_table(title or f"{len(result.runs)} runs", "task", "layers", "quantity", numbers=numbers)
    for each in result.correlations:
        add_row(table, *_group(each), each.quantity, str(each.runs), cell(each.r, "+.2f"), _interval(each))
    for pair in result.differences:
        compared = f"{pair.quantity} minus {pair.other}"
        add_row(table, *_group(pair), compared, str(pair.runs), cell(pair.difference, "+.2f"), _interval(pair))
    demand = [f"demand: the hyperparameter {result.demand}"] if result.demand else []
    add_caption(table, [*result.notes, *demand, *_cell_lines(result)])
    return table


def _group(each: Correlation | CorrelationDifference) -> tuple[str, str]:
    return each.task or "all", each.featurizer or "all"


def _interval(each: Correlation | CorrelationDifference) -> str:
    return "-" if each.low is None or each.high is None else f"{each.low:+.2f} to {each.high:+.2f}"


def _cell_lines(result: Study) -> list[str]:
    """Return the grid in words: metric, utilization and the correlation within runs by TSS and demand."""
    lines = []
    for at in result.cells:
        numbers = (("metric", at.metric), ("ESS", at.effective_size), ("used", at.utilization_ratio))
        known = [f"{name} {value:.3g}" for name, value in (*numbers, ("r within runs", at.within_correlation))
                 if value is not None]  # fmt: skip
        place = " ".join(filter(None, (at.task, at.featurizer)))
        lines.append(
            f"{place or 'runs'}, TSS {at.state_capacity:g}, {result.demand} {at.demand:g} ({at.runs} runs): "
            + ", ".join(known)
        )
    return lines
