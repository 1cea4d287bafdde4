"""The recording and alerting rules: the table `rules.yml`, filled in with the settings."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from ess_monitor import validation
from ess_monitor.alerts.config import AlertsConfig
from ess_monitor.alerts.rules.base import PREFIX, Alert, Group, RecordingRule, dump, duration, percent
from ess_monitor.alerts.rules.grafana import render_grafana_rules
from ess_monitor.alerts.table import read_table
from ess_monitor.records import CONDITION_INFO

__all__ = ["PREFIX", "Alert", "Group", "RecordingRule", "render_grafana", "render_rules", "rule_groups"]

_TABLE = Path(__file__).with_name("rules.yml")
_HEADING = (
    "Recording and alerting rules of ess_monitor. Written by `ess_monitor.alerts.export`, which also writes them for "
    "another job name and other thresholds; edit the settings rather than this file."
)


def rule_groups(config: AlertsConfig) -> tuple[Group, ...]:
    """Return all rules for these settings.

    Examples:
        >>> groups = rule_groups(AlertsConfig())
        >>> [rule.name for rule in groups[1].rules]
        ['InterventionFailing', 'InterventionFlapping', 'InterventionIneffective']
    """
    validation.instance("config", config, AlertsConfig)
    table = read_table(_TABLE, _values(config))
    return tuple(
        Group(name, tuple(_rule(row, config.runbook_base_url) for row in rows)) for name, rows in table.items()
    )


def _rule(row: dict[str, Any], runbook_base_url: str) -> RecordingRule | Alert:
    if "record" in row:
        return RecordingRule(row.pop("record"), **row)
    name = row.pop("alert")
    return Alert(name, **row, runbook_url=f"{runbook_base_url}/{PREFIX}{name}.md")


def _values(config: AlertsConfig) -> dict[str, str]:
    """Return what stands in the table for `<name>`.

    Each setting is there, and again as `_duration` or `_percent` as a reader sees it. `running` keeps the processes
    whose run goes on: they say so, and their last step is not of long ago, as in the textfile of a killed one.
    """
    of_job, process = f'job="{config.job}"', "on (job, instance, run_id, rank)"
    running = (
        f'{process} (ess_monitor_run_status{{{of_job}, status="running"}} == 1 '
        f"and {process} time() - ess_monitor_last_step_timestamp_seconds{{{of_job}}} <= {config.alive_seconds})"
    )
    values = {"ineffective_window": duration(config.ineffective_for_seconds + 3600)}
    for condition, info in CONDITION_INFO.items():
        values |= {f"{condition}_alert": info.alert, f"{condition}_predicate": info.predicate}
    for name, value in config:
        values[name] = f"{value:g}" if isinstance(value, float) else str(value)
        if name.endswith("_seconds"):
            values[name.replace("_seconds", "_duration")] = duration(value)
        elif name.endswith("_ratio"):
            values[name.replace("_ratio", "_percent")] = percent(value)
    return {**values, "job": of_job, "running": running}


def render_rules(config: AlertsConfig) -> str:
    """Return the rule file that Prometheus loads, with a comment above every rule."""
    lines = [*_comment(_HEADING), "groups:"]
    for group in rule_groups(config):
        lines += [f"  - name: {group.name}", "    rules:"]
        for rule in group.rules:
            written = [*_comment(rule.why), dump([rule.as_yaml()])]
            lines.append(textwrap.indent("\n".join(written), 6 * " "))
    return "\n".join(lines).rstrip() + "\n"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, 104)]


def render_grafana(config: AlertsConfig) -> str:
    """Return the provisioning file of the same alerts, for Grafana to evaluate."""
    return render_grafana_rules(config, rule_groups(config))
