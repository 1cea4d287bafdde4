"""The page of two runs, side by side at equal steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ess_monitor import validation
from ess_monitor.records import layer_title
from ess_monitor.report.components import Table, evenly, event_rows, metric_charts, present, steps_of
from ess_monitor.report.figures import Chart, Scale, Series, line_chart, x_ticks
from ess_monitor.report.history import RunHistory
from ess_monitor.report.page import render
from ess_monitor.report.sections.run_facts import run_facts
from ess_monitor.report.sections.utilization import HeatRow, heat_map
from ess_monitor.report.summary import headline, named, paragraphs, percent

STEPS_COMPARED = 5
_LAYERS_NAMED = 6
_NOTABLE_DIFFERENCE = 0.1
"""Difference in utilization from which a layer is named in the summary; readings of one run scatter by less."""


def render_comparison(first: RunHistory, second: RunHistory) -> str:
    """Return the page of two runs as HTML: differences, utilization of each layer at equal steps, findings, metrics.

    Layers are matched by name. The runs share one axis of steps. Where a run was not measured at a step, its newest
    reading before that step counts.

    Args:
        first: run A.
        second: run B.

    Returns:
        One whole document; it needs no other file.
    """
    for name, run in (("first", first), ("second", second)):
        validation.instance(name, run, RunHistory, hint="load_history(path) reads one")
    runs = {"A": first, "B": second}
    steps, scale = equal_steps(first, second), steps_of(first, second)
    return render(
        "compare.html",
        title=f"{first.info.run_name} and {second.info.run_name}: two runs compared",
        opening=f"At step {steps[-1]}, the last that both runs reached:"
        if steps
        else "No step was measured in both runs: nothing can be compared at equal steps.",
        differences=_differences(first, second, steps),
        sides=[_side(letter, run) for letter, run in runs.items()],
        facts=_facts(first, second),
        pairs=_heat_pairs(runs, scale),
        ticks=x_ticks(scale),
        at_steps=_utilization_table(first, second, steps),
        metrics=metric_charts(runs, scale),
        sizes=_sizes(runs, scale),
    )


def _side(letter: str, run: RunHistory) -> dict[str, Any]:
    return {
        "letter": letter,
        "title": run.info.run_name,
        "headline": headline(run),
        "paragraphs": paragraphs(run),
        "events": event_rows(run),
    }


def equal_steps(first: RunHistory, second: RunHistory) -> tuple[int, ...]:
    """Return evenly spaced steps in the range that both runs were measured in; none where there is no such range."""
    if not first.measurements or not second.measurements:
        return ()
    start, end = max(first.steps[0], second.steps[0]), min(first.steps[1], second.steps[1])
    return tuple(evenly(range(start, end + 1), STEPS_COMPARED))


def _differences(first: RunHistory, second: RunHistory, steps: Sequence[int]) -> list[str]:
    """Say which layers, and at the last of the steps which utilizations and metrics, differ."""
    lines = []
    for letter, run, other in (("A", first, second), ("B", second, first)):
        if only := [layer for layer in run.layers if layer not in other.layers]:
            lines.append(f"Only in {letter}: {named(only)}.")
    if not steps:
        return lines
    gaps = []
    for layer in _in_both(first.layers, second.layers):
        a, b = (_utilization(run, layer, steps[-1]) for run in (first, second))
        if a is not None and b is not None and abs(a - b) >= _NOTABLE_DIFFERENCE:
            gaps.append((abs(a - b), f"{layer_title(layer)}: utilization {percent(a)} in A and {percent(b)} in B."))
    gaps.sort(key=lambda gap: -gap[0])
    lines += [line for _, line in gaps[:_LAYERS_NAMED]] or ["No layer's utilization differs by a tenth or more."]
    for name in _in_both(first.metric_names, second.metric_names):
        values = [[value for step, value in run.metric(name) if step <= steps[-1]] for run in (first, second)]
        if all(values):
            lines.append(f"{name} is {values[0][-1]:.3g} in A and {values[1][-1]:.3g} in B.")
    return lines


def _utilization_table(first: RunHistory, second: RunHistory, steps: Sequence[int]) -> Table | None:
    common = _in_both(first.layers, second.layers)
    if not steps or not common:
        return None
    rows = tuple(
        (
            layer_title(layer),
            *(" / ".join(percent(_utilization(run, layer, step)) for run in (first, second)) for step in steps),
        )
        for layer in common
    )
    return Table("Utilization, A / B", ("layer", *(f"step {step}" for step in steps)), rows)


def _in_both(names: Sequence[str], others: Sequence[str]) -> list[str]:
    return [name for name in names if name in others]


def _utilization(run: RunHistory, layer: str, step: int) -> float | None:
    reading = run.at(layer, step)
    return None if reading is None else reading.utilization_ratio


def _facts(first: RunHistory, second: RunHistory) -> Table:
    left, right = dict(run_facts(first)), dict(run_facts(second))
    rows = tuple((name, left.get(name, "–"), right.get(name, "–")) for name in {**left, **right})
    return Table("Facts of both runs", ("", "A", "B"), rows)


def _layers(runs: Mapping[str, RunHistory]) -> list[str]:
    return list(dict.fromkeys(layer for run in runs.values() for layer in run.layers))


def _heat_pairs(runs: Mapping[str, RunHistory], scale: Scale) -> list[tuple[str, list[tuple[str, HeatRow]]]]:
    """Return the title of each layer, and its row in the heat map of each run that has the layer."""
    rows_by_run: dict[str, dict[str, HeatRow]] = {}
    for letter, run in runs.items():
        heat = heat_map(run, "utilization_ratio", scale)
        rows_by_run[letter] = {} if heat is None else dict(zip(run.layers, heat.rows, strict=True))
    pairs = []
    for layer in _layers(runs):
        if pair := [(letter, rows[layer]) for letter, rows in rows_by_run.items() if layer in rows]:
            pairs.append((layer_title(layer), pair))
    return pairs


def _sizes(runs: Mapping[str, RunHistory], scale: Scale) -> tuple[Chart, ...]:
    charts = []
    for layer in _layers(runs):
        series = [
            Series(f"ESS in {letter}", letter.lower(), run.series(layer, "effective_size"))
            for letter, run in runs.items()
        ]
        capacity = next((found for run in runs.values() if (found := run.series(layer, "state_capacity"))), [])
        charts.append(line_chart(layer_title(layer), [*series, Series("TSS", "limit", capacity)], scale))
    return present(*charts)
