"""The dashboards as they are shipped, and what is in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.alerts.helpers import ALERTS

DASHBOARDS = sorted((ALERTS / "grafana/dashboards").glob("*.json"))


class Asked(NamedTuple):
    """One expression and the place that asks it."""

    place: str
    expr: str
    instant: bool = False


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Panels that show something: rows are headings."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def asked(dashboard: dict[str, Any]) -> Iterator[Asked]:
    """Every expression of panels and annotations, as it stands in the file."""
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield Asked(f"{dashboard['uid']}: {panel['title']} {target['refId']}", target["expr"], target["instant"])
    for mark in dashboard["annotations"]["list"]:
        yield Asked(f"{dashboard['uid']}: annotation {mark['name']}", mark["expr"])


def label_values(dashboard: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Variable, the series it asks for, and the label whose values it offers."""
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            (found,) = re.findall(r"^label_values\((.+), (\w+)\)$", variable["query"])
            yield variable["name"], *found
