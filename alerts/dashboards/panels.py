"""Builds a panel in Grafana's JSON model from its row in a table.

A row has a `title`, what the panel shows and why one would look (`about`), and its kind with the queries: one
expression, a list of them, or legend -> expression. All other keys are optional.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ess_monitor.records import CONDITION_INFO, condition_title

Row = dict[str, Any]

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_CONDITION_NAMES = {
    str(number): (condition_title(name), "text" if info.color == "gray" else info.color)
    for number, (name, info) in enumerate(CONDITION_INFO.items())
}
"""Number of a condition -> its title and color. Grafana's gray is the color of text, in light and dark themes."""
_REFS = "ABCDEFGH"
_DASHED = [
    {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [8, 8]}},
    {"id": "color", "value": {"mode": "fixed", "fixedColor": "text"}},
]
_LINK = {
    "asDropdown": False,
    "icon": "",
    "includeVars": False,
    "keepTime": False,
    "tags": [],
    "targetBlank": False,
    "tooltip": "",
    "type": "link",
}


def panel(row: Row, common: Row) -> tuple[dict[str, Any], int, int]:
    """Return the panel of a row without its place, its width and its height."""
    kind = next(name for name in common["kinds"] if name in row)
    style = common["kinds"][kind]
    queries, dashed = _queries(row[kind]), _queries(row.get("dashed", {}))
    targets = [
        {
            "refId": ref_id,
            "datasource": SOURCE,
            "expr": expr,
            "legendFormat": legend,
            "format": "table" if kind == "table" else "time_series",
            "instant": kind in ("number", "table"),
            "range": kind not in ("number", "table"),
        }
        for ref_id, (legend, expr) in zip(_REFS, queries + dashed, strict=False)
    ]
    content = {
        "type": style["type"],
        "title": row["title"],
        "description": row["about"],
        "datasource": SOURCE,
        "repeatDirection": "h",
        "transparent": False,
        "options": style["options"] | ({"textMode": "name"} if row.get("show_name") else {}),
        "targets": targets,
        "fieldConfig": {
            "defaults": _defaults(row, kind, common),
            "overrides": [
                *(_override("byFrameRefID", ref_id, _DASHED) for ref_id in _REFS[len(queries) : len(targets)]),
                *_column_overrides(row),
            ],
        },
        **_transformations(row),
    }
    width, height = style["size"]
    return content, row.get("width", width), row.get("height", height)


def _queries(written: Any) -> list[tuple[str, str]]:
    """Return legends and expressions."""
    if isinstance(written, dict):
        return list(written.items())
    return [("__auto", expr) for expr in ([written] if isinstance(written, str) else written)]


def _defaults(row: Row, kind: str, common: Row) -> dict[str, Any]:
    """Return what holds for all fields of the panel: unit, limits, colors, names of values, links."""
    defaults = {"unit": "short", **common["kinds"][kind]["defaults"]}
    defaults |= {key: row[key] for key in ("unit", "min", "max", "decimals") if key in row}
    if kind == "number":
        steps = zip((None, 1), row.get("colors", ["blue"]), strict=False)
        defaults["thresholds"] = {"mode": "absolute", "steps": [{"value": at, "color": color} for at, color in steps]}
    if "names" in row:
        names = _CONDITION_NAMES if row["names"] == "conditions" else row["names"]
        options = {
            value: {"text": text, "color": color, "index": index}
            for index, (value, (text, color)) in enumerate(names.items())
        }
        defaults["mappings"] = [{"type": "value", "options": options}]
    if "link" in row:
        defaults["links"] = [_LINK | common["links"][row["link"]]]
    return {key: value for key, value in defaults.items() if value is not None}


def _override(matcher: str, options: str, properties: list[dict[str, Any]]) -> dict[str, Any]:
    return {"matcher": {"id": matcher, "options": options}, "properties": properties}


def _column_overrides(row: Row) -> Iterator[dict[str, Any]]:
    """Yield the unit and the link of each column of a table."""
    for title in row.get("columns", {}).values():
        properties = [{"id": "unit", "value": row.get("units", {}).get(title, "short")}]
        if title in row.get("opens", {}):
            properties.append({"id": "links", "value": [{"title": "Open", "url": row["opens"][title]}]})
        yield _override("byName", title, properties)


def _transformations(row: Row) -> dict[str, Any]:
    """Return how the queries of a table are joined, and its columns ordered and named."""
    if "columns" not in row:
        return {}
    organize = {
        "excludeByName": dict.fromkeys(("Time", "__name__", *row.get("hidden", ())), True),
        "indexByName": {field: index for index, field in enumerate(row["columns"])},
        "renameByName": row["columns"],
    }
    return {"transformations": [{"id": "merge", "options": {}}, {"id": "organize", "options": organize}]}
