"""The dashboards as files."""

from __future__ import annotations

import json
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from ess_monitor.alerts.dashboards.fleet import fleet
from ess_monitor.alerts.dashboards.layer import layer
from ess_monitor.alerts.dashboards.run import run


def render_dashboards() -> dict[str, str]:
    """File name -> JSON with sorted keys, the same text every time."""
    files = {}
    for board in (fleet(), run(), layer()):
        content = _without_placement(json.loads(JSONEncoder().encode(board)))
        files[f"{board.uid}.json"] = json.dumps(content, indent=2, sort_keys=True) + "\n"
    return files


def _without_placement(content: Any) -> Any:
    """Without the SDK's own default, which hides links and marks in a menu that only the newest Grafana has."""
    if isinstance(content, dict):
        return {
            key: _without_placement(value) for key, value in content.items() if key != "placement" or value != _MENU
        }
    return [_without_placement(item) for item in content] if isinstance(content, list) else content


_MENU = "inControlsMenu"
