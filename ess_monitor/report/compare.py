"""The page of two runs, side by side at equal steps."""

from __future__ import annotations

from dataclasses import dataclass

from ess_monitor import validation
from ess_monitor.report.components import METRICS_SHOWN, EventRow, Table, event_rows, steps_of
from ess_monitor.report.figures import Chart, Scale, Series, line_chart, value_scale, x_ticks
from ess_monitor.report.history import RunHistory
from ess_monitor.report.page import render
from ess_monitor.report.sections.run_facts import run_facts
from ess_monitor.report.sections.utilization import HeatRow, heat_map
from ess_monitor.report.summary import Paragraph, headline, layer_title, named, paragraphs, percent

STEPS_COMPARED = 5
_NOTABLE = 0.1
"""Difference in utilization from which a layer is named in the summary: more than readings of one run scatter."""


@dataclass(frozen=True)
class Side:
    """One of the two runs."""

    letter: str
    title: str
    headline: str
    paragraphs: tuple[Paragraph, ...]
    events: tuple[EventRow, ...]


@dataclass(frozen=True)
class HeatPair:
    """One layer in both runs; a run without the layer has no row."""

    title: str
    rows: tuple[tuple[str, HeatRow], ...]


def render_comparison(first: RunHistory, second: RunHistory) -> str:
    """The page of two runs as HTML: what differs, utilization of each layer at equal steps, findings, metrics.

    Layers are matched by name. The runs share one axis of steps; where one was not measured at a step, its newest
    reading before it counts.

    Args:
        first: run A.
        second: run B.

    Returns:
        A whole document that needs nothing beside it.
    """
    for name, story in (("first", first), ("second", second)):
        validation.instance(name, story, RunHistory, hint="load_history(path) reads one")
    stories = {"A": first, "B": second}
    opening, lines = differences(first, second)
    scale = steps_of(first, second)
    return render(
        "compare.html",
        title=f"{first.info.run_name} and {second.info.run_name}: two runs compared",
        opening=opening,
        differences=lines,
        sides=[
            Side(letter, s.info.run_name, headline(s), paragraphs(s), event_rows(s)) for letter, s in stories.items()
        ],
        facts=_facts(first, second),
        pairs=_heat_pairs(stories, scale),
        ticks=x_ticks(scale),
        at_steps=utilization_at_equal_steps(first, second),
        metrics=_metrics(stories, scale),
        sizes=_sizes(stories, scale),
    )


def equal_steps(first: RunHistory, second: RunHistory, count: int = STEPS_COMPARED) -> tuple[int, ...]:
    """Steps up to which both runs were measured, evenly spaced; empty where they have none in common."""
    if not first.measurements or not second.measurements:
        return ()
    low = max(first.steps[0], second.steps[0])
    high = min(first.steps[1], second.steps[1])
    if low > high:
        return ()
    return tuple(dict.fromkeys(low + (high - low) * index // (count - 1) for index in range(count)))


def differences(first: RunHistory, second: RunHistory) -> tuple[str, tuple[str, ...]]:
    """An opening sentence, and what differs: layers, utilization at the last common step, and the metrics there."""
    steps = equal_steps(first, second)
    only = [[layer for layer in a.layers if layer not in b.layers] for a, b in ((first, second), (second, first))]
    lines = [f"Only in {run}: {named(layers)}." for run, layers in zip("AB", only, strict=True) if layers]
    if not steps:
        return "No step was measured in both runs: nothing can be compared at equal steps.", tuple(lines)
    end = steps[-1]
    gaps = []
    for layer in (layer for layer in first.layers if layer in second.layers):
        ratios = [_utilization(story, layer, end) for story in (first, second)]
        if ratios[0] is not None and ratios[1] is not None and abs(ratios[0] - ratios[1]) >= _NOTABLE:
            gaps.append((abs(ratios[0] - ratios[1]), layer, ratios))
    for _, layer, ratios in sorted(gaps, key=lambda gap: -gap[0])[:6]:
        lines.append(
            f"{layer_title(layer)} uses {percent(ratios[0])} of its memory in A and {percent(ratios[1])} in B."
        )
    if not gaps:
        lines.append("No layer's utilization differs by a tenth or more.")
    for name in (name for name in first.metric_names if name in second.metric_names):
        values = [[value for step, value in story.metric(name) if step <= end][-1:] for story in (first, second)]
        if all(values):
            lines.append(f"{name} is {values[0][0]:.3g} in A and {values[1][0]:.3g} in B.")
    return f"At step {end}, the last that both runs reached:", tuple(lines)


def utilization_at_equal_steps(first: RunHistory, second: RunHistory) -> Table | None:
    """Utilization of the layers that both runs have, `A / B`."""
    steps = equal_steps(first, second)
    common = [layer for layer in first.layers if layer in second.layers]
    if not steps or not common:
        return None
    rows = tuple(
        (
            layer_title(layer),
            *(" / ".join(percent(_utilization(story, layer, step)) for story in (first, second)) for step in steps),
        )
        for layer in common
    )
    return Table("Utilization, A / B", ("layer", *(f"step {step}" for step in steps)), rows)


def _utilization(story: RunHistory, layer: str, step: int) -> float | None:
    reading = story.at(layer, step)
    return None if reading is None else reading.utilization_ratio


def _facts(first: RunHistory, second: RunHistory) -> Table:
    left, right = dict(run_facts(first)), dict(run_facts(second))
    names = dict.fromkeys([*left, *right])
    rows = tuple((name, left.get(name, "–"), right.get(name, "–")) for name in names)
    return Table("Facts of both runs", ("", "A", "B"), rows)


def _heat_pairs(stories: dict[str, RunHistory], scale: Scale) -> tuple[HeatPair, ...]:
    maps = {letter: heat_map(story, "utilization_ratio", scale) for letter, story in stories.items()}
    layers = dict.fromkeys(layer for story in stories.values() for layer in story.layers)
    pairs = []
    for layer in layers:
        rows = []
        for letter, story in stories.items():
            heat = maps[letter]
            if heat is not None and layer in story.layers:
                rows.append((letter, heat.rows[story.layers.index(layer)]))
        if rows:
            pairs.append(HeatPair(layer_title(layer), tuple(rows)))
    return tuple(pairs)


def _metrics(stories: dict[str, RunHistory], scale: Scale) -> tuple[Chart, ...]:
    names = dict.fromkeys(name for story in stories.values() for name in story.metric_names)
    charts = []
    for name in list(names)[:METRICS_SHOWN]:
        series = [Series(letter, letter.lower(), story.metric(name)) for letter, story in stories.items()]
        axis = value_scale([value for each in series for _, value in each.pairs], zero=False)
        charts.append(line_chart(name, series, scale, y=axis))
    return tuple(chart for chart in charts if chart is not None)


def _sizes(stories: dict[str, RunHistory], scale: Scale) -> tuple[Chart, ...]:
    layers = dict.fromkeys(layer for story in stories.values() for layer in story.layers)
    charts = []
    for layer in layers:
        series = [
            Series(f"ESS in {letter}", letter.lower(), story.series(layer, "effective_size"))
            for letter, story in stories.items()
        ]
        capacity = next((c for s in stories.values() if (c := s.series(layer, "state_capacity"))), [])
        charts.append(line_chart(layer_title(layer), [*series, Series("TSS", "limit", capacity)], scale))
    return tuple(chart for chart in charts if chart is not None)
