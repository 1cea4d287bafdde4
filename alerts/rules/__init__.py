"""The recording and alerting rules, group by group."""

from __future__ import annotations

from ess_monitor import validation
from ess_monitor.alerts.config import AlertsConfig
from ess_monitor.alerts.rules.base import PREFIX, Alert, Group, Record, written
from ess_monitor.alerts.rules.grafana import render_grafana_rules
from ess_monitor.alerts.rules.interventions import interventions
from ess_monitor.alerts.rules.layers import layers
from ess_monitor.alerts.rules.monitor import monitor
from ess_monitor.alerts.rules.run import run

__all__ = ["PREFIX", "Alert", "Group", "Record", "render_grafana", "render_rules", "rule_groups"]

_HEADING = """
    Recording and alerting rules of ess_monitor. Written by `ess_monitor.alerts.export`, which also writes them for
    another job name and other thresholds; edit the settings rather than this file.
"""


def rule_groups(config: AlertsConfig) -> tuple[Group, ...]:
    """All rules for these settings.

    Example:
        >>> groups = rule_groups(AlertsConfig())
        >>> [rule.name for rule in groups[1].rules]
        ['InterventionFailing', 'InterventionFlapping', 'InterventionIneffective']
    """
    validation.instance("config", config, AlertsConfig)
    return (layers(config), interventions(config), run(config), monitor(config))


def render_rules(config: AlertsConfig) -> str:
    """The rule file that Prometheus loads."""
    return written(rule_groups(config), _HEADING)


def render_grafana(config: AlertsConfig) -> str:
    """The provisioning file of the same alerts, for Grafana to evaluate."""
    return render_grafana_rules(config, rule_groups(config))
