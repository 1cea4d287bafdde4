"""`python -m ess_monitor.alerts.dashboards`: write the dashboards to where they are shipped from."""

from __future__ import annotations

from pathlib import Path

from ess_monitor.alerts.dashboards.rendered import render_dashboards

if __name__ == "__main__":
    folder = Path(__file__).resolve().parents[1] / "grafana/dashboards"
    for name, text in render_dashboards().items():
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)
