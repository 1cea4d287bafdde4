"""Heat maps of a ratio of every layer over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from ess_monitor.records import COLOR_SCALE, CONDITIONS, Condition, condition_title
from ess_monitor.report.figures import Figure, condition_color
from ess_monitor.report.labels import short_names

COLUMNS = 240
"""Largest number of columns; each is the mean of neighboring samples."""


@dataclass(frozen=True)
class HeatRow:
    """One row of a heat map."""

    name: str
    values: Sequence[float | None]
    """A value for each step, None where there is none."""
    conditions: Sequence[Condition | None] = ()
    """The condition at each step where it needs attention."""


def heat_figure(
    title: str, steps: Sequence[int], rows: Sequence[HeatRow], orders: Mapping[str, Sequence[str]] | None = None
) -> Figure | None:
    """Return a heat map of ratios, 0 to 1, over the steps, or None where no row has a value.

    Args:
        title: names the quantity.
        steps: step of each value.
        rows: from the top.
        orders: names of the rows in each order that a page offers.
    """
    if not any(value is not None for row in rows for value in row.values):
        return None
    labels = dict(zip([row.name for row in rows], short_names([row.name for row in rows]), strict=True))
    size = max(math.ceil(len(steps) / COLUMNS), 1)
    starts = range(0, len(steps), size)
    columns = [steps[min(first + (size - 1) // 2, len(steps) - 1)] for first in starts]
    heat = {
        "type": "heatmap",
        "x": columns,
        "y": list(labels.values()),
        "z": [[_mean(row.values[first : first + size]) for first in starts] for row in rows],
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[place / (len(COLOR_SCALE) - 1), color] for place, color in enumerate(COLOR_SCALE)],
        "colorbar": {"tickformat": ".0%", "thickness": 10, "xpad": 4, "outlinewidth": 0},
        "hoverongaps": False,
        "hovertemplate": "%{y}<br>step %{x}: %{z:.1%}<extra></extra>",
        "ygap": 1 if len(rows) <= 60 else 0,
    }
    layout = {
        "height": max(90, min(26 * len(rows), 640 + 2 * len(rows))) + 90,
        "plot_bgcolor": "rgba(128, 128, 128, 0.35)",
        "hovermode": "closest",
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom"},
        "xaxis": {"title": {"text": "step"}, "type": "linear", "showgrid": False, "zeroline": False},
        "yaxis": {"type": "category", "range": [len(rows) - 0.5, -0.5], "automargin": True, "showgrid": False},
    }
    return Figure(
        title,
        "; ".join(f"{row.name}: {_row_summary(row)}" for row in rows),
        [heat, *_condition_lines(rows, labels, columns, size)],
        layout,
        tuple(labels),
        {name: [labels[each] for each in order] for name, order in (orders or {}).items()},
    )


def _condition_lines(
    rows: Sequence[HeatRow], labels: Mapping[str, str], columns: Sequence[int], size: int
) -> list[dict[str, Any]]:
    """Draw a line through each row where the layer was in a condition, and switch those of a condition together."""
    edges = [columns[0], *((left + right) / 2 for left, right in pairwise(columns)), columns[-1]]
    found: dict[Condition, tuple[list[float | None], list[str | None]]] = {}
    for row in rows:
        bins = [row.conditions[k * size : (k + 1) * size] for k in range(len(columns))]
        severest = [max((CONDITIONS.index(name) for name in each if name is not None), default=None) for each in bins]
        for severity, group in groupby(range(len(columns)), key=severest.__getitem__):
            if severity is not None:
                places = list(group)
                x, y = found.setdefault(CONDITIONS[severity], ([], []))
                x += [edges[places[0]], edges[places[-1] + 1], None]
                y += [labels[row.name], labels[row.name], None]
    width = 4 if len(rows) <= 60 else 2
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": condition_title(condition),
            "x": x,
            "y": y,
            "line": {"color": condition_color(condition), "width": width},
            "hoverinfo": "skip",
        }
        for condition, (x, y) in found.items()
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return round(sum(known) / len(known), 3) if known else None


def _row_summary(row: HeatRow) -> str:
    known = [value for value in row.values if value is not None]
    if not known:
        return "not measured"
    first, last, lowest, highest = (f"{100 * value:.0f} %" for value in (known[0], known[-1], min(known), max(known)))
    return f"{first} at first, {last} at the end, lowest {lowest}, highest {highest}"
