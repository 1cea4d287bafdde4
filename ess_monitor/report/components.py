"""Tables, event lists and figures of metrics that several pages use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ess_monitor.exporters.evidence import evidence_rows
from ess_monitor.records import Action, Finding, Reading, layer_title
from ess_monitor.report.figures import Figure, Mark, Range, Series, line_figure
from ess_monitor.report.history import RunHistory
from ess_monitor.report.summary import sentence, timeline

T = TypeVar("T")
ROWS_OF_A_TABLE = 40
"""Largest number of measurements in a table; they are evenly spaced."""
"""With many layers fewer, so that a page stays small: see `detail`."""
POINTS_OF_A_CARD = 240
"""Largest number of points of a line in the figure of one layer, likewise."""
METRICS_SHOWN = 6
EVENTS_SHOWN = 300
"""Largest number of entries in the list of events, the first ones."""


@dataclass(frozen=True)
class Table:
    """Text in rows and columns; the first column names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    layer: str = ""
    """Full name of the layer that it is of, by which a page filters. Empty where it is of several."""


@dataclass(frozen=True)
class EventRow:
    """A finding or an action in the list of events."""

    number: int
    step: int
    layer: str
    title: str
    """Name of the layer, as it is shown."""
    kind: str
    """CSS class of its mark: a condition, or `action`."""
    text: str
    advice: str
    evidence: Table | None
    """What a finding rests on; None without evidence, and for an action."""


def steps_of(*runs: RunHistory) -> Range:
    """Return one axis of steps that holds all runs."""
    ranges = [run.steps for run in runs if run.measurements] or [(0, 1)]
    first, last = min(first for first, _ in ranges), max(last for _, last in ranges)
    return float(first), float(max(last, first + 1))


def detail(most: int, layers: int, least: int = 8) -> int:
    """Return how much of each of many layers is shown, so that a page of 200 has the size of one of 24.

    >>> detail(40, 2), detail(40, 24), detail(40, 200)
    (40, 40, 8)
    """
    return max(min(most, 24 * most // max(layers, 1)), least)


def event_rows(history: RunHistory) -> tuple[EventRow, ...]:
    """Return findings and actions, numbered by step."""
    return tuple(
        EventRow(
            number=index,
            step=event.step,
            layer=event.layer,
            title=layer_title(event.layer),
            kind=event.condition if isinstance(event, Finding) else "action",
            text=sentence(event),
            advice=event.advice if isinstance(event, Finding) else "",
            evidence=_evidence_table(event),
        )
        for index, event in enumerate(timeline(history)[:EVENTS_SHOWN], start=1)
    )


def _evidence_table(event: Finding | Action) -> Table | None:
    found = event.evidence if isinstance(event, Finding) else None
    if found is None:
        return None
    caption = f"Evidence on {layer_title(event.layer)}, from batches up to step {found.step}"
    return Table(caption, ("evidence", "value"), evidence_rows(found))


def marks(events: Iterable[EventRow], layer: str | None = None) -> tuple[Mark, ...]:
    """Return the marks of events, of one layer or of all."""
    return tuple(
        Mark(event.step, event.kind, f"event-{event.number}", f"step {event.step}, {event.title}: {event.text}")
        for event in events
        if layer in (None, event.layer)
    )


def metrics_figure(runs: Mapping[str, RunHistory], steps: Range, events: Iterable[EventRow] = ()) -> Figure | None:
    """Draw the metrics of the training loop, the loss first, with a line for each run by its label.

    An empty label stands for the name of the metric.
    """
    names = list(dict.fromkeys(name for run in runs.values() for name in run.curve_names))[:METRICS_SHOWN]
    panels = {
        name: [
            Series(label or name, kind, run.metric(name))
            for kind, (label, run) in zip("ab", runs.items(), strict=False)
        ]
        for name in names
    }
    title = "Metrics of the training at the measured steps"
    return line_figure(title, panels, x_range=steps, from_zero=False, marks=marks(events))


def depth_figure(title: str, lines: Iterable[tuple[str, str, Sequence[float | None]]]) -> Figure | None:
    """Draw values over the depth of the model, a line for each label, kind of line, and value of every layer."""
    series = [
        Series(label, kind, [(float(place), value) for place, value in enumerate(values, start=1) if value is not None])
        for label, kind, values in lines
    ]
    deepest = max((place for each in series for place, _ in each.pairs), default=0.0)
    figure = line_figure(title, {"": series}, x_label="layer", x_range=(0.5, deepest + 0.5))
    if figure is not None:
        figure.layout["xaxis"] |= {"tick0": 1, "dtick": max(1, int(deepest) // 10)}  # layers are whole numbers
    return figure


def metrics_table(history: RunHistory) -> Table:
    """Return the metrics of the training loop at evenly spaced measurements."""
    names = history.curve_names[:METRICS_SHOWN]
    chosen = evenly([each for each in history.measurements if each.metrics], ROWS_OF_A_TABLE)
    rows = tuple((str(each.step), *(cell(each.metrics.get(name)) for name in names)) for each in chosen)
    return Table("Metrics of the training loop at the measured steps", ("step", *names), rows)


def tolerance_title(reading: Reading) -> str:
    """Return the tolerance of a reading as it is shown.

    >>> tolerance_title(Reading(step=0, layer="", status="ok", tolerance_scale="output"))
    "0.001 of each token's output"
    """
    of = " of each token's output" if reading.tolerance_scale == "output" else ""
    return f"{reading.tolerance:g}{of}"


def present(*items: T | None) -> tuple[T, ...]:
    """Return the items that are not None."""
    return tuple(item for item in items if item is not None)


def evenly(items: Sequence[T], count: int) -> list[T]:
    """Return at most `count` items with even gaps, the first and the last among them.

    >>> evenly(range(100), 4)
    [0, 33, 66, 99]
    """
    if len(items) <= count:
        return list(items)
    return [items[index * (len(items) - 1) // (count - 1)] for index in range(count)]


def cell(value: float | None) -> str:
    """Format a number for a table.

    >>> cell(0.12345), cell(None)
    ('0.123', '–')
    """
    return "–" if value is None else f"{value:.3g}"
