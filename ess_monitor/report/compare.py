"""The page of two runs, side by side at equal steps."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from typing import Any

from ess_monitor import validation
from ess_monitor.records import layer_title
from ess_monitor.report.components import POINTS_OF_A_CARD, Table, detail, evenly, event_rows, metrics_figure, steps_of
from ess_monitor.report.figures import Figure, Series, line_figure, share_values
from ess_monitor.report.heat_map import heat_figure
from ess_monitor.report.history import RunHistory
from ess_monitor.report.labels import shared_prefix
from ess_monitor.report.page import render
from ess_monitor.report.sections.layers import by_kind
from ess_monitor.report.sections.run_facts import run_facts
from ess_monitor.report.sections.utilization import ratio_row
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
    steps, layers = equal_steps(first, second), _layers(runs)
    return render(
        "compare.html",
        title=f"{first.info.run_name} and {second.info.run_name}: two runs compared",
        opening=f"At step {steps[-1]}, the last that both runs reached:"
        if steps
        else "No step was measured in both runs: nothing can be compared at equal steps.",
        differences=_differences(first, second, steps),
        sides=[_side(letter, run) for letter, run in runs.items()],
        facts=_facts(first, second),
        prefix=shared_prefix(layers),
        utilization=_utilization_figure(runs, layers, steps),
        at_steps=_utilization_table(first, second, steps),
        metrics=metrics_figure(runs, steps_of(first, second)),
        sizes=_sizes(runs, layers),
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
    for name in _in_both(first.curve_names, second.curve_names):
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


def _utilization_figure(runs: Mapping[str, RunHistory], layers: Sequence[str], steps: Sequence[int]) -> Figure | None:
    """Draw the utilization of each layer with a row for each run that has it, below each other."""
    measured = sorted({each.step for run in runs.values() for each in run.measurements})
    own = {letter: _newest_measured(run, measured) for letter, run in runs.items()}
    rows = {
        layer: [
            ratio_row(run, layer, "utilization_ratio", f"{layer_title(layer)} ({letter})", own[letter])
            for letter, run in runs.items()
            if layer in run.layers
        ]
        for layer in layers
    }

    def difference(layer: str) -> float:
        used = [_utilization(run, layer, steps[-1]) for run in runs.values()] if steps else []
        return abs(used[0] - used[1]) if used and None not in used else 0.0  # type: ignore[operator]

    def names(order: Sequence[str]) -> list[str]:
        return [row.name for layer in order for row in rows[layer]]

    farthest = sorted(layers, key=difference, reverse=True)
    orders = {"the largest difference at the end": names(farthest), "the model": names(layers)}
    return heat_figure("Utilization in A and B", measured, [row for layer in farthest for row in rows[layer]], orders)


def _newest_measured(run: RunHistory, steps: Sequence[int]) -> list[int]:
    """Return the newest measured step at or before each step; -1 before the first and after the last."""
    own = [each.step for each in run.measurements]
    return [own[bisect(own, step) - 1] if own and own[0] <= step <= own[-1] else -1 for step in steps]


def _sizes(runs: Mapping[str, RunHistory], layers: Sequence[str]) -> dict[str, Figure]:
    steps, figures = steps_of(*runs.values()), {}
    for layer in layers:
        lines = [
            Series(f"ESS in {letter}", letter.lower(), run.series(layer, "effective_size"))
            for letter, run in runs.items()
        ]
        capacity = next((found for run in runs.values() if (found := run.series(layer, "state_capacity"))), [])
        panel = {"": [*lines, Series("TSS", "limit", capacity)]}
        points = detail(POINTS_OF_A_CARD, len(layers), least=40)
        if figure := line_figure(layer_title(layer), panel, x_range=steps, points=points):
            figures[layer] = figure
    for kind in by_kind(*runs.values()):
        share_values(figures.get(layer) for layer in kind)
    return figures
