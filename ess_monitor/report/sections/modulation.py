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
    late = _late_means(history)
    taus = sorted({tau for means in late.values() for tau in means})
    if not taus:
        return None
    tau = max(taus, key=lambda each: sum(means.get(each, 0.0) for means in late.values()))
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
    late = _late_means(history)
    taus = sorted({tau for means in late.values() for tau in means})
    rows = tuple((layer_title(layer), *(cell(means.get(tau)) for tau in taus)) for layer, means in late.items())
    columns = ("layer", *(f"tau {tau:g}" for tau in taus))
    return Table("Mean over the last quarter of the readings", columns, rows) if taus else None


def _late_means(history: RunHistory) -> dict[str, dict[float, float]]:
    """Return for each layer the mean at every tolerance over the last quarter of its readings: one alone is noisy."""
    found: dict[str, dict[float, float]] = {}
    for layer, readings in _known(history).items():
        late = [dict(reading.modulation_ratio) for reading in readings[-max(1, len(readings) // 4) :]]
        by_tau = {
            tau: [ratios[tau] for ratios in late if tau in ratios] for tau in {tau for each in late for tau in each}
        }
        found[layer] = {tau: sum(values) / len(values) for tau, values in sorted(by_tau.items())}
    return found


def _known(history: RunHistory) -> dict[str, list[Reading]]:
    """Return the readings of each layer that have a modulation, without layers that have none."""
    known = {layer: [each for each in history.ok(layer) if each.modulation_ratio] for layer in history.layers}
    return {layer: readings for layer, readings in known.items() if readings}
