"""State modulation of every layer over the steps, and at every tolerance."""

from __future__ import annotations

from itertools import cycle

from ess_monitor.records import Reading, layer_title
from ess_monitor.report.components import Table, cell, steps_of
from ess_monitor.report.figures import Figure, Mark, Series, line_figure
from ess_monitor.report.history import RunHistory

LINES = 8
"""Layers of a figure: of more, those with the largest modulation."""


def modulation_figure(history: RunHistory, marks: tuple[Mark, ...] = ()) -> Figure | None:
    """Draw a line for each layer, at the tolerance at which the layers modulate most in the end; None without any."""
    last = [dict(readings[-1].modulation_ratio) for readings in _known(history).values()]
    taus = sorted({tau for ratios in last for tau in ratios})
    if not taus:
        return None
    tau = max(taus, key=lambda each: sum(ratios.get(each, 0.0) for ratios in last))
    lines = {
        layer: [
            (reading.step, ratios[tau]) for reading in readings if tau in (ratios := dict(reading.modulation_ratio))
        ]
        for layer, readings in _known(history).items()
    }
    largest = sorted((layer for layer in lines if lines[layer]), key=lambda layer: -abs(lines[layer][-1][1]))[:LINES]
    kinds = zip([layer for layer in lines if layer in largest], cycle("abcd"), strict=False)
    series = [Series(layer_title(layer), kind, lines[layer]) for layer, kind in kinds]
    title = f"State modulation at separators, tau {tau:g}"
    return line_figure(title, {"": series}, x_range=steps_of(history), marks=marks)


def modulation_table(history: RunHistory) -> Table | None:
    """Return the mean of each layer over the last quarter of its readings, at every tolerance; None without any."""
    known = _known(history)
    taus = sorted({tau for readings in known.values() for reading in readings for tau, _ in reading.modulation_ratio})
    if not taus:
        return None
    rows = []
    for layer, readings in known.items():
        late = [dict(reading.modulation_ratio) for reading in readings[-max(1, len(readings) // 4) :]]
        means = ([ratios[tau] for ratios in late if tau in ratios] for tau in taus)
        rows.append((layer_title(layer), *(cell(sum(each) / len(each) if each else None) for each in means)))
    return Table(
        "Mean over the last quarter of the readings", ("layer", *(f"tau {tau:g}" for tau in taus)), tuple(rows)
    )


def _known(history: RunHistory) -> dict[str, list[Reading]]:
    """Return the readings of each layer that have a modulation, without layers that have none."""
    known = {layer: [each for each in history.ok(layer) if each.modulation_ratio] for layer in history.layers}
    return {layer: readings for layer, readings in known.items() if readings}
