"""The parts of a page that are more than text: tables, marks of events, and the charts of one run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ess_monitor.records import Action, Finding
from ess_monitor.report.figures import Chart, Marker, Scale, Series, line_chart, step_scale, value_scale
from ess_monitor.report.history import RunHistory
from ess_monitor.report.summary import layer_title, sentence, timeline

ROWS_OF_A_TABLE = 40
"""Measurements in a data table, evenly spaced: enough to read a curve off."""

COLUMNS_OF_A_TABLE = 12
METRICS_SHOWN = 6
EVENTS_SHOWN = 300
"""Rows in the list of events. A run with more flaps, and the first ones say so."""

_CLOSE_PERCENT = 5.0
"""Marks nearer than this would cover each other and share one."""

_SEVERITY = ("action", "unknown", "healthy", "saturated", "collapsed")


@dataclass(frozen=True)
class Table:
    """Text in rows and columns; the first column names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class EventRow:
    """A finding or an action in the list of events."""

    number: int
    step: int
    layer: str
    title: str
    """The layer's name as text."""
    kind: str
    """Style of its mark: a condition, or `action`."""
    text: str
    advice: str


def steps_of(*stories: RunHistory) -> Scale:
    """One axis of steps on which all runs fit."""
    ranges = [story.steps for story in stories if story.measurements] or [(0, 1)]
    return step_scale(min(first for first, _ in ranges), max(last for _, last in ranges))


def event_rows(story: RunHistory) -> tuple[EventRow, ...]:
    """Findings and actions, numbered by step."""
    return tuple(
        EventRow(
            number=index,
            step=event.step,
            layer=event.layer,
            title=layer_title(event.layer),
            kind=_kind(event),
            text=sentence(event),
            advice=event.advice if isinstance(event, Finding) else "",
        )
        for index, event in enumerate(timeline(story)[:EVENTS_SHOWN], start=1)
    )


def markers(events: Iterable[EventRow], scale: Scale) -> tuple[Marker, ...]:
    """Events as marks on the axis of steps; those too near to each other share one, in the color of the worst."""
    groups: list[list[EventRow]] = []
    for event in events:
        close = groups and 100 * (scale.place(event.step) - scale.place(groups[-1][0].step)) < _CLOSE_PERCENT
        groups[-1].append(event) if close else groups.append([event])
    return tuple(
        Marker(
            at=round(100 * scale.place(group[0].step), 2),
            label=str(group[0].number) if len(group) == 1 else f"{group[0].number}–{group[-1].number}",
            kind=max((event.kind for event in group), key=_SEVERITY.index),
            target=f"event-{group[0].number}",
            text="; ".join(f"step {event.step}, {event.title}: {event.text}" for event in group[:4]),
        )
        for group in groups
    )


def metric_charts(story: RunHistory, scale: Scale, marks: Sequence[Marker]) -> tuple[Chart, ...]:
    """The loss first, then the other metrics of the training loop, with what was found and done."""
    charts = []
    for name in story.metric_names[:METRICS_SHOWN]:
        pairs = story.metric(name)
        axis = value_scale([value for _, value in pairs], zero=False)
        charts.append(line_chart(name, [Series(name, "a", pairs)], scale, y=axis, markers=marks))
    return tuple(chart for chart in charts if chart is not None)


def ratio_table(story: RunHistory, quantity: str, caption: str) -> Table:
    """A ratio of every layer at a few steps: the heat map as numbers."""
    chosen = evenly(story.measurements, COLUMNS_OF_A_TABLE)
    rows = []
    for layer in story.layers:
        values = dict(story.series(layer, quantity))
        rows.append((layer_title(layer), *(cell(values.get(each.step)) for each in chosen)))
    return Table(caption, ("layer", *(f"step {each.step}" for each in chosen)), tuple(rows))


def metrics_table(story: RunHistory) -> Table:
    """The metrics of the training loop at a few steps."""
    names = story.metric_names[:METRICS_SHOWN]
    chosen = evenly([each for each in story.measurements if each.metrics], ROWS_OF_A_TABLE)
    rows = tuple((str(each.step), *(cell(each.metrics.get(name)) for name in names)) for each in chosen)
    return Table("Metrics of the training loop at the measured steps", ("step", *names), rows)


def evenly(items: Sequence, count: int) -> list:  # type: ignore[type-arg]
    """At most `count` items with even gaps, the first and the last among them.

    >>> evenly(range(100), 4)
    [0, 33, 66, 99]
    """
    if len(items) <= count:
        return list(items)
    return [items[index * (len(items) - 1) // (count - 1)] for index in range(count)]


def _kind(event: Finding | Action) -> str:
    return event.condition if isinstance(event, Finding) else "action"


def cell(value: float | None) -> str:
    """A number in a table; a dash where there is none.

    >>> cell(0.12345), cell(None)
    ('0.123', '–')
    """
    return "–" if value is None else f"{value:.3g}"
