"""Rule tests as values: these series go in, and at this second these alerts fire, and no others of that name.

Time starts at 0 and everything happens on a grid of `GRID` seconds, at which series are sampled and rules evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ess_monitor.alerts.config import AlertsConfig
from ess_monitor.alerts.rules import PREFIX, Alert
from ess_monitor.alerts.rules.base import duration

GRID = 30
"""Seconds between two samples and between two evaluations. Half of it shows no more and takes twice the time."""
RUN, LAYER = "wla-7", "blocks.1.mixer"
STATUS, LAST_STEP = "ess_monitor_run_status", "ess_monitor_last_step_timestamp_seconds"
_OF_PROCESS = ("instance", "job", "rank", "run_id")


@dataclass(frozen=True)
class Firing:
    """An alert as it must arrive at Alertmanager. Its texts are those of the rule, filled in."""

    labels: Mapping[str, str]
    value: str = ""
    """`$value` as the texts show it."""
    texts: tuple[str, str] | None = None
    """Summary and description of a rule whose templates have branches."""

    def as_yaml(self, alert: Alert) -> dict[str, Any]:
        """Return the alert in promtool's format."""
        summary, description = self.texts or (self._filled(alert.summary), self._filled(alert.description))
        return {
            "exp_labels": {**self.labels, "severity": alert.severity},
            "exp_annotations": {**alert.annotations(), "summary": summary, "description": description},
        }

    def _filled(self, template: str) -> str:
        text = re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: self.labels[found[1]], template)
        return re.sub(r"\{\{ [^{}]*\$value[^{}]* \}\}", self.value, text)


@dataclass(frozen=True)
class AlertCase:
    """One alert on one set of series. Processes of which the series do not say it run all the time."""

    name: str
    alert: str
    """Without the prefix."""
    series: Mapping[str, str]
    """Selector -> values in promtool's notation."""
    expected: Mapping[int, Sequence[Firing]]
    """Second -> what fires then; nothing where the sequence is empty."""
    others: Mapping[str, Mapping[int, Sequence[Firing]]] = field(default_factory=dict)
    """The same of other alerts on these series."""

    def as_yaml(self, alerts: Mapping[str, Alert]) -> dict[str, Any]:
        """Return the test in promtool's format. `alerts` are the rules by name."""
        return {
            **_inputs(self.name, self.series, max(max(expected) for expected in self.all_expected.values())),
            "alert_rule_test": [
                {
                    "eval_time": duration(second),
                    "alertname": PREFIX + alert,
                    "exp_alerts": [firing.as_yaml(alerts[alert]) for firing in firings],
                }
                for alert, expected in self.all_expected.items()
                for second, firings in sorted(expected.items())
            ],
        }

    @property
    def all_expected(self) -> dict[str, Mapping[int, Sequence[Firing]]]:
        """Return what is expected of every alert of the case."""
        return {self.alert: self.expected, **self.others}


@dataclass(frozen=True)
class RecordCase:
    """Recording rules on one set of series, of processes that run as those of an `AlertCase`."""

    name: str
    series: Mapping[str, str]
    at: int
    """Second at which the records are evaluated."""
    samples: Mapping[str, Mapping[str, float]]
    """Record -> its samples by label set; empty where it must have none."""

    def as_yaml(self) -> dict[str, Any]:
        """Return the test in promtool's format."""
        return {
            **_inputs(self.name, self.series, self.at),
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


def _inputs(name: str, series: Mapping[str, str], until: int) -> dict[str, Any]:
    complete = {**dict(_running(series, until)), **series}
    inputs = [{"series": selector, "values": values} for selector, values in complete.items()]
    return {"name": name, "interval": duration(GRID), "input_series": inputs}


def _running(series: Mapping[str, str], until: int) -> Iterator[tuple[str, str]]:
    """Yield what says that the processes of some series run."""
    for selector in series:
        name, labels = selector.split("{", 1)
        of_process = [label for label in labels[:-1].split(",") if label.split("=")[0] in _OF_PROCESS]
        if name != "up":
            yield f'{STATUS}{{{",".join(of_process)},status="running"}}', held((1, until + GRID))
            yield f"{LAST_STEP}{{{','.join(of_process)}}}", counting(GRID, until + GRID)


def target(config: AlertsConfig, rank: int = 0, **labels: str) -> dict[str, str]:
    """Return the labels of a scraped rank, and further ones."""
    return {"instance": "10.0.0.7:9464", "job": config.job, "rank": str(rank), "run_id": RUN, **labels}


def run_labels(config: AlertsConfig, **labels: str) -> dict[str, str]:
    """Return the labels of a run without those of its ranks, and further ones."""
    return {"job": config.job, "run_id": RUN, **labels}


def braces(labels: Mapping[str, str]) -> str:
    """Return a label set, without spaces at which a line could be broken.

    >>> braces({"job": "x", "rank": "0"})
    '{job="x",rank="0"}'
    """
    return "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}"


def series(config: AlertsConfig, name: str, rank: int = 0, **labels: str) -> str:
    """Return the selector of a series of a scraped rank."""
    return name + braces(target(config, rank, **labels))


def on_grid(seconds: int) -> int:
    """Return the next moment at which something is evaluated.

    >>> on_grid(60), on_grid(61)
    (60, 90)
    """
    return -(-seconds // GRID) * GRID


def held(*stretches: tuple[float, int]) -> str:
    """Return values that are held for so many seconds each.

    >>> held((0, 60), (1, 90))
    '0+0x1 1+0x2'
    """
    parts = ((value, on_grid(seconds) // GRID) for value, seconds in stretches)
    return " ".join(f"{value:.12g}+0x{n - 1}" for value, n in parts if n)


def counting(per_sample: float, seconds: int, start: float = 0) -> str:
    """Return a value that grows evenly for so many seconds.

    >>> counting(15, 120)
    '0+15x3'
    """
    return f"{start:.12g}+{per_sample:.12g}x{on_grid(seconds) // GRID - 1}"


def between(fires: int, ends: int, firing: Firing, last: Firing | None = None) -> dict[int, tuple[Firing, ...]]:
    """Return silence before `fires` and from `ends` on, and `firing` in between; just before the end it is `last`."""
    return {fires - GRID: (), fires: (firing,), ends - GRID: (last or firing,), ends: ()}


def humanized(seconds: int) -> str:
    """Return what Prometheus' humanizeDuration makes of whole seconds.

    >>> humanized(975), humanized(7200)
    ('16m 15s', '2h 0m 0s')
    """
    parts = ((seconds // 86400, "d"), (seconds // 3600 % 24, "h"), (seconds // 60 % 60, "m"), (seconds % 60, "s"))
    first = next((k for k, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(f"{count}{unit}" for count, unit in parts[first:])
