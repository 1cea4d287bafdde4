"""Alerts on training runs: Prometheus rules with their unit tests, runbooks, Alertmanager routing, dashboards.

The files in this folder can be used as they are; `export` writes them out for another job name and other thresholds.
No rule has a threshold of its own for a condition: the process decides whether a layer is collapsed or saturated, so
that alerts, curves and the autopilot never disagree.

    prometheus/     rules, promtool tests of every rule, examples for scraping
    alertmanager/   routing by severity, inhibition
    runbooks/       one page per alert
    grafana/        dashboards; provisioning of data sources, dashboards and Grafana-managed alerts
    compose/        Prometheus, Alertmanager and Grafana in containers, for the runs of one machine
    rules/          the table of rules, and how it is written for Prometheus and for Grafana
    cases/          the promtool tests as values that follow the thresholds
    dashboards/     the tables of panels, and how they are written as Grafana's JSON

After a change in the last three: `ess_monitor.alerts.export("alerts", overwrite=True)` writes the committed files.
"""

from __future__ import annotations

from ess_monitor.alerts.config import AlertsConfig
from ess_monitor.alerts.export import export, render
from ess_monitor.alerts.rules import rule_groups

__all__ = ["AlertsConfig", "export", "render", "rule_groups"]
