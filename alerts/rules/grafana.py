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
from ess_monitor.alerts.rules.base import PREFIX, Alert, Group, Record, clean, dump, duration

INTERVAL_SECONDS = 60
"""Between two evaluations; the shortest waiting time by default."""
_LOOK_BACK_SECONDS = 600
"""Range of an instant query. It only has to hold the last sample."""
_RECORDED = re.compile(r"\b(?:run|rank|run_layer):[a-z0-9_]+:[a-z0-9_]+\{([^{}]*)\}")
_DEFAULT_JOB = AlertsConfig().job
_HEADING = """\
# The alerts as Grafana-managed rules, written by ess_monitor.alerts.export from the Prometheus rules.
# Put into /etc/grafana/provisioning/alerting/. Use these or the Prometheus rules: with both, every alert comes twice.
# EssMonitorInterventionIneffective resolves here when its window has passed, as Grafana keeps no ALERTS series.
"""


def render_grafana_rules(config: AlertsConfig, groups: Sequence[Group]) -> str:
    """The provisioning file of the alerts of `groups`."""
    records = {rule.name: rule.expr for group in groups for rule in group.rules if isinstance(rule, Record)}
    written = [
        {
            "orgId": 1,
            "name": group.name,
            "folder": _folder(config.job),
            "interval": duration(INTERVAL_SECONDS),
            "rules": [_rule(rule, records, config) for rule in group.rules if isinstance(rule, Alert)],
        }
        for group in groups
    ]
    return _HEADING + dump({"apiVersion": 1, "groups": written})


def written_out(expr: str, records: Mapping[str, str], job: str) -> str:
    """An expression with its recording rules in place; further matchers move into the selectors of the record.

    >>> written_out('run:m:max{job="j", x="1"} > 0', {"run:m:max": 'max by (job, x) (m{job="j"})'}, "j")
    '(max by (job, x) (m{job="j", x="1"})) > 0'
    """

    def replace(found: re.Match[str]) -> str:
        name = found.group(0).split("{")[0]
        own = f'job="{job}"'
        matchers = found.group(1).replace(own, "", 1)
        inner = clean(records[name]).replace(f"{{{own}", f"{{{own}{matchers}")
        return f"({written_out(inner, records, job)})"

    return _RECORDED.sub(replace, expr)


def _rule(alert: Alert, records: Mapping[str, str], config: AlertsConfig) -> dict[str, Any]:
    rule: dict[str, Any] = {
        "uid": _uid(alert.name, config.job),
        "title": PREFIX + alert.name,
        "condition": "fires",
        "data": [
            _query(written_out(clean(alert.expr), records, config.job), config.grafana_datasource_uid),
            _expression("there", "math", "is_number($query) || is_nan($query) || is_inf($query)"),
            _expression("fires", "threshold", "there", conditions=[{"evaluator": {"type": "gt", "params": [0]}}]),
        ],
        # Nothing is what a Prometheus rule returns that does not fire. An error is not: Grafana raises one of its own.
        "noDataState": "OK",
        "execErrState": "Error",
        "for": duration(alert.for_seconds),
    }
    if alert.keep_firing_for_seconds:
        rule["keepFiringFor"] = duration(alert.keep_firing_for_seconds)
    rule["labels"] = {"severity": alert.severity}
    rule["annotations"] = {
        "summary": _template(alert.summary),
        "description": _template(alert.description),
        "runbook_url": alert.runbook_url,
    }
    rule["isPaused"] = False
    return rule


def _query(expr: str, datasource_uid: str) -> dict[str, Any]:
    return {
        "refId": "query",
        "relativeTimeRange": {"from": _LOOK_BACK_SECONDS, "to": 0},
        "datasourceUid": datasource_uid,
        "model": {
            "refId": "query",
            "datasource": {"type": "prometheus", "uid": datasource_uid},
            "expr": expr,
            "instant": True,
            "range": False,
        },
    }


def _expression(ref_id: str, kind: str, expression: str, **settings: Any) -> dict[str, Any]:
    source = {"type": "__expr__", "uid": "__expr__"}
    model = {"refId": ref_id, "datasource": source, "type": kind, "expression": expression, **settings}
    return {"refId": ref_id, "datasourceUid": "__expr__", "model": model}


def _template(text: str) -> str:
    return re.sub(r"\$value\b", "$values.query.Value", text)


def _uid(name: str, job: str) -> str:
    """At most 40 characters of those that Grafana takes, and another one for every job."""
    own = "" if job == _DEFAULT_JOB else f"-{zlib.crc32(job.encode()):08x}"
    return f"ess-{name.lower()}{own}"


def _folder(job: str) -> str:
    """Names must differ within a folder only, so every job has its own; a slash would make a folder in a folder."""
    return "ESS Monitor" if job == _DEFAULT_JOB else f"ESS Monitor {job.replace('/', '-')}"
