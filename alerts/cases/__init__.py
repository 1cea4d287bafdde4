"""Unit tests of the rules, for `promtool test rules`; they follow the thresholds that are set."""

from __future__ import annotations

from ess_monitor.alerts.cases.base import GRID, AlertCase, RecordCase
from ess_monitor.alerts.cases.interventions import intervention_cases
from ess_monitor.alerts.cases.layers import layer_cases
from ess_monitor.alerts.cases.lifecycle import lifecycle_cases
from ess_monitor.alerts.cases.monitor import monitor_cases
from ess_monitor.alerts.cases.records import record_cases
from ess_monitor.alerts.cases.run import run_cases
from ess_monitor.alerts.config import AlertsConfig
from ess_monitor.alerts.rules import Alert, rule_groups
from ess_monitor.alerts.rules.base import dump, duration

__all__ = ["AlertCase", "RecordCase", "render_tests", "rule_cases"]


def rule_cases(config: AlertsConfig) -> dict[str, tuple[AlertCase | RecordCase, ...]]:
    """Return the cases of each file by its name.

    Examples:
        >>> sorted(rule_cases(AlertsConfig()))
        ['interventions.yml', 'layers.yml', 'lifecycle.yml', 'monitor.yml', 'records.yml', 'run.yml']
    """
    return {
        "interventions.yml": tuple(intervention_cases(config)),
        "layers.yml": tuple(layer_cases(config)),
        "lifecycle.yml": tuple(lifecycle_cases(config)),
        "monitor.yml": tuple(monitor_cases(config)),
        "records.yml": tuple(record_cases(config)),
        "run.yml": tuple(run_cases(config)),
    }


def render_tests(config: AlertsConfig) -> dict[str, str]:
    """Return the content of each test file by its name, for a folder `tests` beside the rule file."""
    alerts = {rule.name: rule for group in rule_groups(config) for rule in group.rules if isinstance(rule, Alert)}
    files = {}
    for name, cases in rule_cases(config).items():
        content = {
            "rule_files": ["../ess_monitor.rules.yml"],
            "evaluation_interval": duration(GRID),
            "tests": [case.as_yaml(alerts) if isinstance(case, AlertCase) else case.as_yaml() for case in cases],
        }
        files[name] = f"# Written by ess_monitor.alerts.export. Run with: promtool test rules *.yml\n{dump(content)}"
    return files
