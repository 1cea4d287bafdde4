"""Figures as Plotly's JSON. A page draws them with the script that it carries, a notebook with the library itself.

The colors of data fit a light and a dark ground. Text and grid are left to whoever draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from ess_monitor.errors import ConfigError
from ess_monitor.records import CONDITION_INFO, condition_title
from ess_monitor.report.labels import exact, number, plain, rounded

POINTS_OF_A_LINE = 600
"""Largest number of points of a line: a screen has about as many columns."""

COLORS = {"gray": "#868c96", "green": "#2e9e5b", "yellow": "#b98500", "red": "#e0483e", "blue": "#3d85d9"}
"""Colors of conditions, by the names in `CONDITION_INFO`, and of actions."""
STYLES: dict[str, dict[str, Any]] = {
    "a": {"color": "#3d85d9", "dash": "solid", "width": 2},
    "b": {"color": "#d0701a", "dash": "dash", "width": 2},
    "c": {"color": "#9b6fd6", "dash": "dot", "width": 2},
    "d": {"color": "#d6508f", "dash": "dashdot", "width": 2},
    "limit": {"color": "#868c96", "dash": "longdash", "width": 1},
}
"""Line of each kind of series: color and dashes tell them apart."""
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up")
"""Marks of groups of points, beside their colors."""
_MARGINS_OF_A_PAGE = 64
"""Pixels above and below a figure on a page, see page.js."""
_TITLE, _LEGEND = 40, 76
"""Pixels above a figure in a notebook, the latter for up to four rows."""
_TICKS = 9
"""Up to so many values of a logarithmic axis are marked one by one, instead of 2, 5 and 10."""
_BAND = "rgba(61, 133, 217, 0.2)"

Pairs = Sequence[tuple[float, float]]
Range = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Data of one line: (x, y) in the order of x."""

    label: str
    kind: str
    """A key of `STYLES`."""
    pairs: Pairs


@dataclass(frozen=True)
class Mark:
    """A finding or an action, marked at its step."""

    step: int
    kind: str
    """A condition, or `action`."""
    target: str
    """Id of its entry in the list of events."""
    text: str


@dataclass(frozen=True)
class Figure:
    """A figure that pages and notebooks draw from the same data."""

    title: str
    summary: str
    """The figure in words, for screen readers."""
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    rows: tuple[str, ...] = ()
    """Full name of each row of a heat map, by which a page filters."""
    orders: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Labels of the rows in another order, by the name of the order."""
    can_be_logarithmic: bool = False
    """Whether a page offers a logarithmic axis of values."""
    layer: str = ""
    """Full name of the layer that it is of, by which a page filters. Empty where it is of several."""

    def to_plotly(self) -> Any:
        """Return a `plotly.graph_objects.Figure`.

        Raises:
            ConfigError: plotly is not installed.
        """
        try:
            plotly: Any = import_module("plotly.graph_objects")
        except ModuleNotFoundError as error:
            raise ConfigError(
                'figure: needs plotly: pip install "ess-monitor[plotly]"; the pages of `ess-monitor report` do not'
            ) from error
        title = {"text": plain(self.title), "x": 0, "xref": "paper", "y": 0.98, "yanchor": "top", "font": {"size": 14}}
        legend = any(trace["type"] == "scatter" and trace.get("showlegend", True) for trace in self.data)
        top, bottom = _TITLE + _LEGEND * legend, 50
        margin = {"l": 60, "r": 20, "t": top, "b": bottom}
        frame = {"title": title, "height": self.layout["height"] - _MARGINS_OF_A_PAGE + top + bottom, "margin": margin}
        return plotly.Figure({"data": self.data, "layout": {**self.layout, **frame}})


def line_figure(
    title: str,
    panels: Mapping[str, Sequence[Series]],
    *,
    x_label: str = "step",
    x_range: Range | None = None,
    log_x: bool = False,
    log_y: bool = False,
    from_zero: bool = True,
    band: tuple[Pairs, Pairs] | None = None,
    marks: Sequence[Mark] = (),
    points: int = POINTS_OF_A_LINE,
    layer: str = "",
) -> Figure | None:
    """Return lines over a common axis, in panels below each other, or None where no series has a value.

    Args:
        title: names the quantity and its unit.
        panels: the series of each panel, by what stands beside its axis; empty ones are left out.
        x_label: names the common axis.
        x_range: ends of the common axis; by default those of the data.
        log_x: whether that axis is logarithmic.
        log_y: whether the axes of values are. Values up to 0 have no place on them.
        from_zero: whether axes of values that are not logarithmic hold zero.
        band: lower and upper bound, drawn behind the lines of the first panel.
        marks: events at steps.
        points: largest number of points of a line.
        layer: full name of the one layer that is drawn, if it is one.
    """
    drawn = {name: kept for name, series in panels.items() if (kept := [each for each in series if each.pairs])}
    if not drawn:
        return None
    count, data = len(drawn), [] if band is None or not band[0] else _band(band, points)
    x_axis: dict[str, Any] = {"title": {"text": x_label}, "anchor": f"y{_index(count)}"}
    x_axis |= {"type": "log" if log_x else "linear"}
    if log_x and len(steps := {x for series in drawn.values() for each in series for x, _ in each.pairs}) <= _TICKS:
        x_axis |= {"tickvals": sorted(steps), "ticktext": [number(x) for x in sorted(steps)]}
    if x_range is not None:
        logs = [math.log10(end) for end in x_range] if log_x else []
        x_axis["range"] = [logs[0] - 1e-3, logs[1] + 1e-3] if log_x else list(x_range)  # with room for the outer marks
    layout: dict[str, Any] = {
        "height": 110 + 150 * count if count > 1 else 290,
        "hovermode": "x unified",
        "hoversubplots": "axis",
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": x_axis,
    }
    listed: set[str] = set()
    for place, (name, series) in enumerate(drawn.items(), start=1):
        axis = f"yaxis{_index(place)}"
        layout[axis] = {
            "domain": [1 - (place - 0.12 * (place < count)) / count, 1 - (place - 1) / count],
            "type": "log" if log_y else "linear",
            "rangemode": "tozero" if from_zero else "normal",
            "title": {"text": plain(name)},
            "hoverformat": ".4g",
        } | ({"exponentformat": "power"} if log_y else {})
        is_named = [each.label for each in series] == [name]
        for each in series:
            data.append({**_line(each, place, points), "showlegend": not is_named and each.label not in listed})
            if count > 1:
                data[-1]["legendgroup"] = plain(each.label)  # one entry switches the lines of all panels
            listed.add(each.label)
        if marks:
            layout[f"yaxis{count + place}"] = {
                "overlaying": f"y{_index(place)}", "range": [0, 1], "visible": False, "fixedrange": True
            }  # fmt: skip
            data += _marks(marks, count + place, shown=place == 1)
    several = [f"{name}, " if name and name != each.label else "" for name in drawn for each in drawn[name]]
    lines = [each for series in drawn.values() for each in series]
    summary = "; ".join(prefix + _summary(each, x_label) for prefix, each in zip(several, lines, strict=True))
    return Figure(title, summary, data, layout, can_be_logarithmic=not log_y and not from_zero, layer=layer)


def share_values(figures: Iterable[Figure | None]) -> None:
    """Give figures of the same kind one axis of values, so that neighbors can be compared."""
    drawn = [figure for figure in figures if figure is not None]
    is_log = any(figure.layout["yaxis"]["type"] == "log" for figure in drawn)
    lines = [trace for figure in drawn for trace in figure.data if "yaxis" not in trace]
    values = [value for trace in lines for value in trace["y"] if value is not None and (value > 0 or not is_log)]
    if not values:
        return
    low, high = min(values), max(values)
    if is_log:
        low, high = math.log10(low), math.log10(high)
    else:
        low = min(low, 0.0)
    margin = 0.05 * (high - low) or 0.5
    for figure in drawn:
        figure.layout["yaxis"]["range"] = [low - margin if is_log or low < 0 else 0, high + margin]


def thin(pairs: Pairs, points: int = POINTS_OF_A_LINE) -> list[tuple[float, float]]:
    """Return at most about `points` pairs: the lowest and the highest of every stretch, in order.

    >>> thin([(x, float(x == 50)) for x in range(100)], points=4)
    [(0, 0.0), (1, 0.0), (50, 1.0), (51, 0.0)]
    """
    if len(pairs) <= points:
        return list(pairs)
    stretches = max(points // 2, 1)
    kept: list[tuple[float, float]] = []
    for index in range(stretches):
        stretch = pairs[index * len(pairs) // stretches : (index + 1) * len(pairs) // stretches]
        low = min(range(len(stretch)), key=lambda k: stretch[k][1])
        high = max(range(len(stretch)), key=lambda k: (stretch[k][1], k != low, -k))
        kept += [stretch[k] for k in sorted({low, high})]
    return kept


def _line(series: Series, axis: int, points: int) -> dict[str, Any]:
    pairs = thin(series.pairs, points)
    trace = {
        "type": "scatter",
        "mode": "lines" if len(pairs) > 1 else "markers",
        "name": plain(series.label),
        "x": [exact(x) for x, _ in pairs],
        "y": [rounded(y) for _, y in pairs],
        "line": STYLES[series.kind],
        "marker": {"color": STYLES[series.kind]["color"]},
    }
    return trace if axis == 1 else {**trace, "yaxis": f"y{axis}"}


def _band(band: tuple[Pairs, Pairs], points: int) -> list[dict[str, Any]]:
    shared: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "legendgroup": "bounds",
    }
    both = [
        {**shared, "x": [exact(x) for x, _ in pairs], "y": [rounded(y) for _, y in pairs]}
        for pairs in (thin(each, points) for each in band)
    ]
    both[0] |= {"legendgroup": "bounds", "showlegend": False}
    both[1] |= {"legendgroup": "bounds", "name": "certified bounds", "fill": "tonexty", "fillcolor": _BAND}
    return both


def _marks(marks: Sequence[Mark], axis: int, *, shown: bool) -> list[dict[str, Any]]:
    """Draw a line at the step of each event, with a dot at its top, and switch those of a kind together."""
    traces = []
    for kind in dict.fromkeys(mark.kind for mark in marks):
        own = [mark for mark in marks if mark.kind == kind]
        traces.append({
            "type": "scatter",
            "mode": "lines+markers",
            "name": condition_title(kind),  # type: ignore[arg-type]
            "legendgroup": kind,
            "showlegend": shown,
            "cliponaxis": False,
            "yaxis": f"y{axis}",
            "x": [step for mark in own for step in (mark.step, mark.step, None)],
            "y": [0, 1, None] * len(own),
            "line": {"color": condition_color(kind), "width": 1, "dash": "dot"},
            "marker": {"color": condition_color(kind), "size": [0, 9, 0] * len(own),
                       "symbol": "square" if kind == "action" else "circle"},
            "customdata": [target for mark in own for target in (mark.target, mark.target, None)],
            "text": [text for mark in own for text in (plain(mark.text), plain(mark.text), "")],
            "hovertemplate": "%{text}<extra></extra>",
        })  # fmt: skip
    return traces


def condition_color(kind: str) -> str:
    """Return the color of a condition, or of an action."""
    return COLORS["blue" if kind == "action" else CONDITION_INFO[kind].color]  # type: ignore[index]


def _summary(series: Series, x_label: str) -> str:
    (first_x, first), (last_x, last) = series.pairs[0], series.pairs[-1]
    values = [value for _, value in series.pairs]
    return (
        f"{series.label}: {number(first)} at {x_label} {number(first_x)}, "
        f"{number(last)} at {x_label} {number(last_x)}, lowest {number(min(values))}, highest {number(max(values))}"
    )


def _index(place: int) -> str:
    return "" if place == 1 else str(place)
