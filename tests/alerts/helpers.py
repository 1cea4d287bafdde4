"""What the exporter really serves, and what a text says about it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import ess_monitor.alerts
from ess_monitor.diagnosis import DiagnosisConfig, thresholds
from ess_monitor.exporters.prometheus.collector import SnapshotCollector
from ess_monitor.exporters.prometheus.pushgateway import PushgatewayConfig
from ess_monitor.pipeline.counters import RunCounters
from tests.exporters.helpers import PLAIN_LAYERS, action, evidence, reading, run_info, state_evidence

ROOT = Path(__file__).parents[2]
ALERTS = Path(ess_monitor.alerts.__file__).parent
DOCS = ROOT / "docs"

TARGET_LABELS = frozenset({"job", "instance", "run_id", "rank"})
"""Set by service discovery, never by the process."""
ALERT_LABELS = frozenset({"alertname", "alertstate", "severity"})
"""Of the series ALERTS, which Prometheus writes itself."""
FREE_LABELS = frozenset(
    {*TARGET_LABELS, "layer", "exporter", "le", "run_name", "model", "strategy", "precision", "world_size"}
)
"""Labels whose values depend on the run."""

_PUSHED_JOB = PushgatewayConfig().job
"""Looks like a metric and is the name of a job."""
_METRIC = re.compile(r"(?<![\w:.])(ess_monitor_[a-z0-9_]+)(?![\w:/]|\.\w)(\{[^{}]*\})?")
_MATCHER = re.compile(r'([a-zA-Z_]\w*)\s*(=~|!~|!=|=)\s*\\?"((?:[^"\\]|\\[^"])*)\\?"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^()]*)\)")


@dataclass(frozen=True)
class Served:
    """Sample name -> label -> the values it had; and type and labels of each family."""

    samples: dict[str, dict[str, set[str]]]
    families: dict[str, tuple[str, frozenset[str]]]

    @property
    def labels(self) -> set[str]:
        return {label for labels in self.samples.values() for label in labels} | TARGET_LABELS


def served() -> Served:
    """Every family with every label child, from a ledger to which everything has happened once."""
    ledger = RunCounters(PLAIN_LAYERS, wall_clock=lambda: 1_000_300.0)
    ledger.step(1, 0.1)
    found = {layer: evidence(layer) for layer in PLAIN_LAYERS}
    states = {layer: state_evidence(layer) for layer in PLAIN_LAYERS}
    ledger.measured(
        "ok",
        [reading(layer, modulation_ratio=((0.1, 0.25),)) for layer in PLAIN_LAYERS],
        evidence=found,
        state_evidence=states,
    )
    ledger.autopilot(
        (action(), action(action="rescale_alpha"), action(action="advise")), ("rescale_alpha",), budget=3, enabled=True
    )
    sinks = {"event_log": 0, "tensorboard": 0}
    run = run_info(thresholds=thresholds(DiagnosisConfig(metric="accuracy", metric_solved=0.9)))
    registry = CollectorRegistry()
    registry.register(SnapshotCollector(run, lambda: ledger.snapshot(sinks, sinks, sinks)))
    samples: dict[str, dict[str, set[str]]] = {}
    families: dict[str, tuple[str, frozenset[str]]] = {}
    text = generate_latest(registry).decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            seen = samples.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                seen.setdefault(label, set()).add(value)
    declared = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    for name, kind in declared:
        own = [labels for sample, labels in samples.items() if sample in _samples_of(name)]
        assert own, f"{name} is declared and has no sample: populate it here"
        families[name] = (kind, frozenset(set().union(*own) - {"le"}))
    return Served(samples, families)


def _samples_of(family: str) -> set[str]:
    return {family, *(f"{family}_{end}" for end in ("bucket", "sum", "count"))}


def expressions(path: Path) -> list[str]:
    """The PromQL of a file: rules, fenced blocks of a runbook, targets and variables of a dashboard."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return re.findall(r"^```promql\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    if path.suffix == ".json":
        return list(_strings(json.loads(text), {"expr", "expression", "query", "definition"}))
    return [text]


def _strings(content: Any, keys: set[str]) -> Iterator[str]:
    if isinstance(content, dict):
        for key, value in content.items():
            if key in keys and isinstance(value, str):
                yield value
            else:
                yield from _strings(value, keys)
    elif isinstance(content, list):
        for item in content:
            yield from _strings(item, keys)


def problems(text: str, known: Served, recorded: set[str]) -> list[str]:
    """Metrics, labels and label values that a text names and that do not exist."""
    found = []
    for name, selector in _METRIC.findall(text):
        if name == _PUSHED_JOB:
            continue
        if name not in known.samples and name not in known.families:
            found.append(f"metric {name}")
            continue
        labels = known.samples.get(name, {})
        for label, operator, value in _MATCHER.findall(selector):
            if label not in labels and label not in TARGET_LABELS:
                found.append(f"label {label} of {name}")
            elif label not in FREE_LABELS and "$" not in value:
                values = value.split("|") if "~" in operator else [value]
                found += [f"{name}{{{label}={v!r}}}" for v in values if v not in labels[label] and v != ".+"]
    for name in re.findall(r"\b(?:run|rank|run_layer):[a-z0-9_]+:[a-z0-9_]+", text):
        if name not in recorded:
            found.append(f"recorded series {name}")
    return found


def unknown_groupings(expression: str, known: Served) -> list[str]:
    """Labels in `by (...)`, `on (...)` and the like that no series has. For PromQL: in prose these words mean else."""
    return [
        f"label {label} in ({grouping})"
        for grouping in _GROUPING.findall(expression)
        for label in (part.strip() for part in grouping.split(","))
        if label and "$" not in label and label not in known.labels | ALERT_LABELS | {"__name__"}
    ]


def need(tool: str, package: str) -> None:
    """Skip without `tool`; fail where CI promises it."""
    if shutil.which(tool) is None:
        reason = f"{tool} is not on PATH; install the package `{package}` (Debian, Ubuntu)"
        if os.environ.get("CI", "").lower() not in ("", "0", "false"):
            pytest.fail(f"CI promises the server tools, but {reason}", pytrace=False)
        pytest.skip(reason)
