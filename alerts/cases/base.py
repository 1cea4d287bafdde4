"""What a rule test says: these series go in, and at this second these alerts fire, and no others of that name.

Time starts at 0 and everything happens on a grid of `GRID` seconds, at which series are sampled and rules evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ess_monitor.alerts.config import AlertsConfig
from ess_monitor.alerts.rules.base import PREFIX, dump, duration

GRID = 30
"""Seconds between two samples and between two evaluations. Half of it tells no more and takes twice the time."""
INSTANCE, RUN = "10.0.0.7:9464", "wla-7"


@dataclass(frozen=True)
class Firing:
    """An alert as it must arrive at Alertmanager."""

    labels: Mapping[str, str]
    summary: str
    description: str


@dataclass(frozen=True)
class AlertCase:
    """One alert on one set of series."""

    name: str
    alert: str
    """Without the prefix."""
    severity: str
    series: Mapping[str, str]
    """Selector -> values in promtool's notation."""
    expected: Mapping[int, Sequence[Firing]]
    """Second -> what fires then; nothing where the sequence is empty."""

    def as_yaml(self, config: AlertsConfig) -> dict[str, Any]:
        """The test in promtool's format."""
        return {
            **_inputs(self.name, self.series),
            "alert_rule_test": [
                {
                    "eval_time": duration(second),
                    "alertname": PREFIX + self.alert,
                    "exp_alerts": [self._alert(firing, config) for firing in firings],
                }
                for second, firings in sorted(self.expected.items())
            ],
        }

    def _alert(self, firing: Firing, config: AlertsConfig) -> dict[str, Any]:
        return {
            "exp_labels": {**firing.labels, "severity": self.severity},
            "exp_annotations": {
                "summary": firing.summary,
                "description": firing.description,
                "runbook_url": f"{config.runbook_base_url}/{PREFIX}{self.alert}.md",
            },
        }


@dataclass(frozen=True)
class RecordCase:
    """Recording rules on one set of series."""

    name: str
    series: Mapping[str, str]
    at: int
    """Second at which the records are read."""
    samples: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Record -> its samples by label set; empty where it must have none."""

    def as_yaml(self) -> dict[str, Any]:
        """The test in promtool's format."""
        return {
            **_inputs(self.name, self.series),
            "promql_expr_test": [
                {
                    "expr": record,
                    "eval_time": duration(self.at),
                    "exp_samples": [
                        {"labels": f"{record}{labels}", "value": value} for labels, value in samples.items()
                    ],
                }
                for record, samples in self.samples.items()
            ],
        }


def on_grid(seconds: int) -> int:
    """The next moment at which something is evaluated.

    >>> on_grid(60), on_grid(61)
    (60, 90)
    """
    return -(-seconds // GRID) * GRID


def target(config: AlertsConfig, rank: int = 0) -> dict[str, str]:
    """Labels of a scraped rank."""
    return {"instance": INSTANCE, "job": config.job, "rank": str(rank), "run_id": RUN}


def run_labels(config: AlertsConfig) -> dict[str, str]:
    """Labels of a run, without those of its ranks."""
    return {"job": config.job, "run_id": RUN}


def series(name: str, labels: Mapping[str, str]) -> str:
    """A selector.

    >>> series("up", {"job": "x"})
    'up{job="x"}'
    """
    return name + braces(labels)


def braces(labels: Mapping[str, str]) -> str:
    """A label set, without spaces at which a line could be broken."""
    return "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}"


def held(*stretches: tuple[float, int]) -> str:
    """Values that are held for so many seconds each.

    >>> held((0, 60), (1, 90))
    '0+0x1 1+0x2'
    """
    parts = ((value, on_grid(seconds) // GRID) for value, seconds in stretches)
    return " ".join(f"{value:.12g}+0x{n - 1}" for value, n in parts if n)


def counting(per_sample: float, seconds: int, start: float = 0) -> str:
    """A value that grows evenly for so many seconds.

    >>> counting(15, 120)
    '0+15x3'
    """
    return f"{start:.12g}+{per_sample:.12g}x{on_grid(seconds) // GRID - 1}"


def written(cases: Sequence[AlertCase | RecordCase], config: AlertsConfig) -> str:
    """The cases as a test file that lies in a folder below the rule file."""
    content = {
        "rule_files": ["../ess_monitor.rules.yml"],
        "evaluation_interval": duration(GRID),
        "tests": [case.as_yaml(config) if isinstance(case, AlertCase) else case.as_yaml() for case in cases],
    }
    return f"# Written by ess_monitor.alerts.export. Run with: promtool test rules *.yml\n{dump(content)}"


def _inputs(name: str, series: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": name,
        "interval": duration(GRID),
        "input_series": [{"series": selector, "values": values} for selector, values in series.items()],
    }
