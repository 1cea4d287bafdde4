"""Unit tests of the rules, for `promtool test rules`; they follow the thresholds that are set."""

from __future__ import annotations

from ess_monitor.alerts.cases.base import AlertCase, RecordCase, written
from ess_monitor.alerts.cases.interventions import intervention_cases
from ess_monitor.alerts.cases.layers import layer_cases
from ess_monitor.alerts.cases.monitor import monitor_cases
from ess_monitor.alerts.cases.parts import part_cases
from ess_monitor.alerts.cases.records import record_cases
from ess_monitor.alerts.cases.run import run_cases
from ess_monitor.alerts.config import AlertsConfig

__all__ = ["AlertCase", "RecordCase", "render_tests", "rule_cases"]


def rule_cases(config: AlertsConfig) -> dict[str, tuple[AlertCase | RecordCase, ...]]:
    """File name -> its cases.

    Example:
        >>> sorted(rule_cases(AlertsConfig()))
        ['interventions.yml', 'layers.yml', 'monitor.yml', 'records.yml', 'run.yml']
    """
    return {
        "interventions.yml": intervention_cases(config),
        "layers.yml": layer_cases(config),
        "monitor.yml": (*monitor_cases(config), *part_cases(config)),
        "records.yml": record_cases(config),
        "run.yml": run_cases(config),
    }


def render_tests(config: AlertsConfig) -> dict[str, str]:
    """File name -> content, for a folder `tests` beside the rule file."""
    return {name: written(cases, config) for name, cases in rule_cases(config).items()}
