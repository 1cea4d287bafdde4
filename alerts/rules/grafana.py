"""The same alerts as rules that Grafana evaluates itself, for places where nobody can load rules into Prometheus.

Names, severities, waiting times and texts are those of the Prometheus rules. Three things differ, because Grafana is
another evaluator: recording rules are written out in each query, as nothing records them; a series that is there counts
as firing whatever its value (`up == 0` is 0); and templates call the value `$values.query.Value`.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from ess_monitor.alerts.config import AlertsConfig
from ess_monitor.alerts.rules.base import PREFIX, Alert, Group, RecordingRule, dump, duration

_LOOK_BACK_SECONDS = 600
"""Range of an instant query. It only has to hold the last sample."""
_RECORDED = re.compile(r"\b(?:run|rank|run_layer):[a-z0-9_]+:[a-z0-9_]+\{([^{}]*)\}")
_OF_PROCESS = ("ess_monitor_last_step_timestamp_seconds", "ess_monitor_run_status")
"""Metrics that say whether a process runs. Matchers on what is recorded of it, such as a condition, are not theirs."""
_SELECTOR = re.compile(r"(\w+)\{([^{}]*)\}")
_NOTHING = "(vector(0) > 0)"
_DEFAULT_JOB = AlertsConfig().job
_HEADING = """\
# The alerts as Grafana-managed rules, written by ess_monitor.alerts.export from the Prometheus rules.
# Put into /etc/grafana/provisioning/alerting/. Use these or the Prometheus rules: with both, every alert comes twice.
# Grafana keeps no series of its own. So EssMonitorInterventionIneffective resolves here when its window has passed, and
# EssMonitorTargetDown fires for a run that has ended in order and is still listed in service discovery.
"""


def render_grafana_rules(config: AlertsConfig, groups: Sequence[Group]) -> str:
    """Return the provisioning file of the alerts of `groups`. Every job has a folder of its own, and own ids."""
    records = {rule.name: rule.expr for group in groups for rule in group.rules if isinstance(rule, RecordingRule)}
    is_default = config.job == _DEFAULT_JOB
    id_end = "" if is_default else f"-{zlib.crc32(config.job.encode()):08x}"  # ids have at most 40 characters
    written = [
        {
            "orgId": 1,
            "name": group.name,
            # A slash would make a folder in a folder.
            "folder": "ESS Monitor" if is_default else f"ESS Monitor {config.job.replace('/', '-')}",
            "interval": "1m",
            "rules": [
                {
                    "uid": f"ess-{rule.name.lower()}{id_end}",
                    **_rule(rule, written_out(rule.expr, records, config.job), config.grafana_datasource_uid),
                }
                for rule in group.rules
                if isinstance(rule, Alert)
            ],
        }
        for group in groups
    ]
    return _HEADING + dump({"apiVersion": 1, "groups": written})


def written_out(expr: str, records: Mapping[str, str], job: str) -> str:
    """Return an expression with its recording rules in place; further matchers move into the selectors of the record.

    A record that holds on to its own last value finds nothing there.

    >>> written_out('run:m:max{job="j", x="1"} > 0', {"run:m:max": 'max by (job, x) (m{job="j"})'}, "j")
    '(max by (job, x) (m{job="j", x="1"})) > 0'
    """

    own = f'job="{job}"'

    def replace(found: re.Match[str]) -> str:
        name, matchers = found[0].split("{")[0], found[1].replace(own, "", 1)
        if name not in records:
            return _NOTHING

        def narrow(selector: re.Match[str]) -> str:
            return f"{selector[1]}{{{selector[2]}{'' if selector[1] in _OF_PROCESS else matchers}}}"

        others = {other: expr for other, expr in records.items() if other != name}
        return f"({written_out(_SELECTOR.sub(narrow, records[name]), others, job)})"

    return _RECORDED.sub(replace, expr)


def _rule(alert: Alert, expr: str, datasource_uid: str) -> dict[str, Any]:
    keep = alert.keep_firing_for_seconds
    source = {"type": "prometheus", "uid": datasource_uid}
    query = {"refId": "query", "datasource": source, "expr": expr, "instant": True, "range": False}
    return {
        "title": PREFIX + alert.name,
        "condition": "fires",
        "data": [
            {
                "refId": "query",
                "relativeTimeRange": {"from": _LOOK_BACK_SECONDS, "to": 0},
                "datasourceUid": datasource_uid,
                "model": query,
            },
            _expression("there", "math", "is_number($query) || is_nan($query) || is_inf($query)"),
            _expression("fires", "threshold", "there", conditions=[{"evaluator": {"type": "gt", "params": [0]}}]),
        ],
        # Nothing is what a Prometheus rule returns that does not fire. An error is not: Grafana raises one of its own.
        "noDataState": "OK",
        "execErrState": "Error",
        "for": duration(alert.for_seconds),
        **({"keepFiringFor": duration(keep)} if keep else {}),
        "labels": {"severity": alert.severity},
        "annotations": {
            name: re.sub(r"\$value\b", "$values.query.Value", text) for name, text in alert.annotations().items()
        },
        "isPaused": False,
    }


def _expression(ref_id: str, kind: str, expression: str, **settings: Any) -> dict[str, Any]:
    source = {"type": "__expr__", "uid": "__expr__"}
    model = {"refId": ref_id, "datasource": source, "type": kind, "expression": expression, **settings}
    return {"refId": ref_id, "datasourceUid": "__expr__", "model": model}
