"""The Grafana dashboards: tables of panels in YAML, one file a dashboard, rendered as Grafana's JSON.

common.yml   what all dashboards and all panels of a kind share
fleet.yml    all runs of a job
run.yml      one run: memory, autopilot, ranks, the monitor itself
layer.yml    one layer of a run
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ess_monitor.alerts.dashboards.panels import SOURCE, Row, panel
from ess_monitor.alerts.table import read_table
from ess_monitor.records import CONDITION_INFO

__all__ = ["render_dashboards"]

_FOLDER = Path(__file__).parent
_RUN_MATCHER = {"fleet": 'run_id=~"$run_id"', "layer": 'run_id="$run_id"', "run": 'run_id="$run_id"'}
"""Dashboard -> how its queries select their run, or in the fleet any number of runs."""
_GRID_COLUMNS = 24
_VARIABLE = {
    "allowCustomValue": True,
    "auto": False,
    "auto_count": 30,
    "auto_min": "10s",
    "includeAll": False,
    "multi": False,
    "skipUrlSync": False,
}


def render_dashboards(job: str) -> dict[str, str]:
    """Return the JSON of each dashboard by its file name. They open on `job`, and a variable selects any other."""
    files = {}
    for name, matcher in _RUN_MATCHER.items():
        values = _values(job, f'job="$job", {matcher}')
        common, table = (read_table(_FOLDER / f"{file}.yml", values) for file in ("common", name))
        variables = [_variable(row) for row in (*common["variables"], *table["variables"])]
        marks = [
            {"builtIn": 0, "datasource": SOURCE, "enable": True, "hide": False, "step": "15s"} | mark
            for mark in common["marks"]
        ]
        content = {
            **common["board"],
            "uid": f"ess-monitor-{name}",
            "title": table["title"],
            "description": table["description"],
            "annotations": {"list": marks},
            "templating": {"list": variables},
            "panels": list(_laid_out(table["sections"], common)),
        }
        files[f"ess-monitor-{name}.json"] = json.dumps(content, indent=2, sort_keys=True) + "\n"
    return files


def _values(job: str, run: str) -> dict[str, str]:
    """Return what stands in the tables for `<name>`."""
    layer = f'{run}, layer="$layer"'
    return {
        "exported_job": json.dumps(job),
        "job": 'job="$job"',
        "run": run,
        "layer": layer,
        "condition_of_run": _condition(run),
        "condition_of_layer": _condition(layer),
        "run_link": "/d/ess-monitor-run?${datasource:queryparam}&${job:queryparam}&${__url_time_range}&var-run_id=",
    }


def _condition(matchers: str) -> str:
    """Return the query of a layer's condition as a number, the worst one where several ranks differ."""
    terms = [
        f'run_layer:ess_monitor_layer_condition:max{{{matchers}, condition="{name}"}} * {number}'
        for number, name in enumerate(CONDITION_INFO)
        if number > 0
    ]
    return f"max by (layer) ({' or '.join(reversed(terms))})"


def _variable(row: Row) -> Row:
    if row.get("type") == "datasource":
        return {**_VARIABLE, **row}
    # Values are sorted naturally, and asked for again when the time range changes.
    query = {"type": "query", "datasource": SOURCE, "definition": row["query"], "refresh": 2, "sort": 7}
    return {**_VARIABLE, **query, **row}


def _laid_out(sections: dict[str, list[Row]], common: Row) -> Iterator[dict[str, Any]]:
    """Yield headings and panels with their places, from left to right and top to bottom.

    Ids count by hundreds of the section, so that a new panel changes only those behind it in its section.
    """
    top = 0
    for number, (title, rows) in enumerate(sections.items(), start=1):
        place = {"h": 1, "w": _GRID_COLUMNS, "x": 0, "y": top}
        yield {"type": "row", "title": title, "id": 100 * number, "gridPos": place, "collapsed": False, "panels": []}
        top, left, height = top + 1, 0, 0
        for index, row in enumerate(rows, start=1):
            content, width, own_height = panel(row, common)
            if left + width > _GRID_COLUMNS:
                top, left, height = top + height, 0, 0
            place = {"h": own_height, "w": width, "x": left, "y": top}
            yield {**content, "id": 100 * number + index, "gridPos": place}
            left, height = left + width, max(height, own_height)
        top += height
