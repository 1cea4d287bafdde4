"""Figures of the page, from the class of figures that reports draw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ess_monitor.report.figures import STYLES, SYMBOLS, Figure

_KINDS = tuple(name for name in STYLES if name != "limit")

Point = tuple[float, float, float, float]
"""x, mean, and both ends of its interval."""


def curves(
    title: str,
    lines: Mapping[str, Sequence[Point]],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """Return lines of means with their intervals."""
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": label,
            "x": [x for x, *_ in points],
            "y": [mean for _, mean, _, _ in points],
            "error_y": _error_bars([ends for _, *ends in points]),
            "line": _style(place),
            "marker": _marker(place),
        }
        for place, (label, points) in enumerate(lines.items())
    ]
    summary = "; ".join(
        f"{label}: " + ", ".join(f"{mean:.3g} at {x:.4g}" for x, mean, _, _ in points)
        for label, points in lines.items()
    )
    layout = _layout(x_label, y_label, log_x=log_x, log_y=log_y)
    if log_x:
        layout["xaxis"]["tickvals"] = sorted({x for points in lines.values() for x, *_ in points})
    return Figure(title, summary, data, layout)


def scatter(
    title: str,
    groups: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """Return a point for each pair."""
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": label,
            "x": [x for x, _ in points],
            "y": [y for _, y in points],
            "marker": {"color": _style(place)["color"], **_marker(place)},
        }
        for place, (label, points) in enumerate(groups.items())
    ]
    summary = "; ".join(f"{label}: {len(points)} points" for label, points in groups.items())
    return Figure(title, summary, data, _layout(x_label, y_label, log_x=log_x, log_y=log_y))


def bars(title: str, groups: Mapping[str, Mapping[str, tuple[float, float, float]]], *, y_label: str) -> Figure:
    """Return bars beside each other, with the ends of their intervals: those of a group have one color."""
    data = [
        {
            "type": "bar",
            "name": label,
            "x": list(found),
            "y": [value for value, _, _ in found.values()],
            "error_y": _error_bars(found.values()),
            "marker": {"color": _style(place)["color"]},
        }
        for place, (label, found) in enumerate(groups.items())
    ]
    summary = "; ".join(
        f"{label}: " + ", ".join(f"{value:.2f} ({name})" for name, (value, _, _) in found.items())
        for label, found in groups.items()
    )
    return Figure(title, summary, data, {**_layout("", y_label), "barmode": "group", "xaxis": {"type": "category"}})


def heat_map(
    title: str,
    columns: Sequence[str],
    rows: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    limits: tuple[float, float],
) -> Figure:
    """Return a cell for each value, from blue at the lower limit to red at the upper one; unknown values are empty."""
    data = {
        "type": "heatmap",
        "x": list(columns),
        "y": list(rows),
        "z": [list(row) for row in values],
        "zmin": limits[0],
        "zmax": limits[1],
        "colorscale": "RdBu",
        "reversescale": True,
        "texttemplate": "%{z:.2f}",
        "hoverongaps": False,
        "colorbar": {"thickness": 10, "outlinewidth": 0},
    }
    layout = {
        "height": 160 + 36 * len(rows),
        "xaxis": {"type": "category"},
        "yaxis": {"type": "category", "autorange": "reversed"},
    }
    summary = "; ".join(
        f"{name}: " + ", ".join("unknown" if value is None else f"{value:.2f}" for value in row)
        for name, row in zip(rows, values, strict=True)
    )
    return Figure(title, summary, [data], layout)


def _style(place: int) -> dict[str, Any]:
    return STYLES[_KINDS[place % len(_KINDS)]]


def _marker(place: int) -> dict[str, Any]:
    return {"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 7}


def _error_bars(ends: Iterable[Sequence[float]]) -> dict[str, Any]:
    """Return the bars of values with both ends of their intervals."""
    ends = list(ends)
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value for value, _, high in ends],
        "arrayminus": [value - low for value, low, _ in ends],
        "thickness": 1,
    }


def _layout(x_label: str, y_label: str, *, log_x: bool = False, log_y: bool = False) -> dict[str, Any]:
    return {
        "height": 340,
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": {"title": {"text": x_label}, "type": "log" if log_x else "linear"},
        "yaxis": {"title": {"text": y_label}, "type": "log" if log_y else "linear"},
    }
