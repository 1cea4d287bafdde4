"""A ratio of every layer over the steps, as a heat map and as numbers."""

from __future__ import annotations

from collections.abc import Sequence

from ess_monitor.records import layer_title
from ess_monitor.report.components import Table, cell, evenly
from ess_monitor.report.figures import Figure
from ess_monitor.report.heat_map import HeatRow, heat_figure
from ess_monitor.report.history import RunHistory
from ess_monitor.report.summary import ATTENTION, by_attention

_COLUMNS_OF_A_TABLE = 12


def ratio_figure(history: RunHistory, quantity: str, title: str) -> Figure | None:
    """Draw a field of `Reading` between 0 and 1 for every layer; None where no layer has it."""
    layers = by_attention(history)
    steps = [each.step for each in history.measurements]
    rows = [ratio_row(history, layer, quantity, layer, steps) for layer in layers]
    return heat_figure(title, steps, rows, {"what needs attention": layers, "the model": history.layers})


def ratio_row(history: RunHistory, layer: str, quantity: str, name: str, steps: Sequence[int]) -> HeatRow:
    """Return the row of a layer under a name, with its values and conditions at these steps."""
    values = dict(history.series(layer, quantity))
    conditions = {each.step: each.conditions.get(layer) for each in history.measurements}
    found = [value if (value := conditions.get(step)) in ATTENTION else None for step in steps]
    return HeatRow(name, [values.get(step) for step in steps], found)


def ratio_table(history: RunHistory, quantity: str, caption: str) -> Table:
    """Return the same field of every layer as numbers, at evenly spaced measurements."""
    steps = [each.step for each in evenly(history.measurements, _COLUMNS_OF_A_TABLE)]
    rows = []
    for layer in by_attention(history):
        values = dict(history.series(layer, quantity))
        rows.append((layer_title(layer), *(cell(values.get(step)) for step in steps)))
    return Table(caption, ("layer", *(f"step {step}" for step in steps)), tuple(rows))
