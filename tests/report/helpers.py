"""Logs of made-up runs, and pages taken apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from ess_monitor.exporters import EventLogConfig, EventLogExporter
from ess_monitor.records import (
    PHASES,
    Action,
    Condition,
    Finding,
    HistogramData,
    LayerInfo,
    Measurement,
    Reading,
    RunInfo,
    RunStatus,
    Snapshot,
)
from ess_monitor.report import page
from tests.exporters.helpers import evidence
from tests.exporters.helpers import snapshot as new_run

TEMPLATES = Path(page.__file__).with_name("templates")
LAYERS = ("blocks.0.mixer", "blocks.1.mixer")
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=https://evil.example/x onerror=alert(1)>',
    "' onfocus='alert(1)",
    "{{ 7 * 7 }}",
    "</style></svg>",
    "\x1b[2J\u202e",
    "&amp;",
)


def reading(layer: str, step: int, utilization: float = 0.25, **fields: Any) -> Reading:
    values: dict[str, Any] = {
        "status": "ok",
        "operators": 4,
        "length": 64,
        "positions": (16, 32, 48),
        "state_capacity": 16.0,
        "attainable_size": 16.0,
        "effective_size": 16 * utilization,
        "entropy_size": 2.5,
        "effective_size_lower": 12 * utilization,
        "effective_size_upper": 20 * utilization,
        "utilization_ratio": utilization,
        "retention_ratio": 0.5,
        "far_share_ratio": 0.0625,
        "per_position": (16 * utilization, 15 * utilization, 14 * utilization),
    }
    return Reading(step=step, layer=layer, **{**values, **fields})


def measurement(step: int, layers: Sequence[str] = LAYERS, **fields: Any) -> Measurement:
    values: dict[str, Any] = {
        "timestamp_seconds": 1_700_000_000.0 + step,
        "readings": tuple(reading(layer, step) for layer in layers),
        "conditions": dict.fromkeys(layers, "healthy"),
        "metrics": {"accuracy": step / 1000, "loss": 3.0 - step / 1000},
        "overhead_ratio": 0.004,
        "interval_steps": 100,
    }
    return Measurement(step=step, **{**values, **fields})


def finding(
    layer: str, step: int, condition: Condition = "collapsed", previous: Condition = "healthy", **fields: Any
) -> Finding:
    advice = "" if condition == "healthy" else "pull A towards I"
    values = {"condition": condition, "previous": previous, "reason": "seen so", "advice": advice, **fields}
    return Finding(step=step, layer=layer, **values)


def action(layer: str, step: int, outcome: Any = "applied", **fields: Any) -> Action:
    values: dict[str, Any] = {
        "action": "pull_to_identity",
        "finding": "seen so",
        "message": "regularizer",
        "strength": 0.5,
    }
    return Action(step=step, layer=layer, outcome=outcome, **{**values, **fields})


def run_info(layers: Sequence[str] = LAYERS, **fields: Any) -> RunInfo:
    values: dict[str, Any] = {
        "run_name": "demo",
        "model": "Net",
        "layers": tuple(LayerInfo(name=name, module="Mixer", supported=True) for name in layers),
        "versions": {"torch": "2.5.0"},
        "thresholds": {"collapsed.upper": 0.3},
        "start_timestamp_seconds": 1_700_000_000.0,
        "overhead_budget_ratio": 0.01,
    }
    return RunInfo(**{**values, **fields})


def snapshot(status: RunStatus = "running", **fields: Any) -> Snapshot:
    """The counters of a run of 900 steps; `fields` replace its own."""
    spent = HistogramData(bounds=(0.01,), counts=(2,), total_seconds=0.5, count=4)
    values: dict[str, Any] = {
        "last_step": 900,
        "steps_total": 900,
        "step_seconds": spent,
        "overhead_seconds": dict.fromkeys(PHASES, spent),
        "overhead_ratio": 0.004,
        "measurements_total": {"ok": 10},
    }
    return new_run(status, **{**values, **fields})


def write_log(
    path: Path,
    measurements: Sequence[Measurement],
    info: RunInfo | None = None,
    *,
    finished: RunStatus | None = "finished",
    **final: Any,
) -> Path:
    """What a run with these measurements leaves behind; without `finished` it was killed."""
    exporter = EventLogExporter(EventLogConfig(path=path), clock=lambda: 1_700_003_600.0)
    exporter.start(info or run_info(), lambda: snapshot(**final))
    for each in measurements:
        exporter.export(each)
    if finished is not None:
        exporter.close(finished)
    elif exporter._file is not None:
        exporter._file.close()
    return path


def rescued_run(layers: Sequence[str] = LAYERS) -> list[Measurement]:
    """The last layer collapses at 400, on evidence, is treated, and is healthy again at 700."""
    measurements = []
    for step in range(0, 1000, 100):
        collapsed = 400 <= step < 700
        conditions: dict[str, Condition] = dict.fromkeys(layers, "healthy")
        conditions[layers[-1]] = "collapsed" if collapsed else "healthy"
        found: tuple[Finding, ...] = ()
        done: tuple[Action, ...] = ()
        if step == 400:
            seen = evidence(layers[-1], step, m50=0.008, m50_error=0.004, outcome="loud")
            found, done = (finding(layers[-1], step, evidence=seen),), (action(layers[-1], step),)
        if step == 700:
            found = (finding(layers[-1], step, "healthy", "collapsed"),)
        readings = tuple(reading(layer, step, 0.1 if collapsed else 0.6) for layer in layers)
        measurements.append(
            measurement(step, layers, readings=readings, conditions=conditions, findings=found, actions=done)
        )
    return measurements


def unwanted_scripts(html: str) -> list[str]:
    """The scripts of a page that are not ours."""
    ours = {(TEMPLATES / name).read_text() for name in ("plotly.min.js", "page.js")}
    return [text for attributes, text in Page(html).scripts if "id" not in attributes and text not in ours]


def figures_of(html: str) -> list[dict[str, Any]]:
    """The figures that a page hands to its script."""
    found = [text for attributes, text in Page(html).scripts if attributes.get("id") == "figures"]
    page = json.loads(found[0]) if found else {"figures": []}

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            named = value.get("shared")
            return {key: whole(each) for key, each in value.items()} if named is None else whole(page["shared"][named])
        return [whole(each) for each in value] if isinstance(value, list) else value

    return list(whole(page["figures"]))


class Page(HTMLParser):
    """A page's elements, its text, where its links lead, and its scripts."""

    VOID = frozenset({"meta", "br", "img", "input", "link", "col", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.unclosed: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        self.unclosed += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "script":
            self.scripts.append((self.elements[-1][1], ""))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.unclosed.append(tag)

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            attributes, text = self.scripts.pop()
            self.scripts.append((attributes, text + data))
        elif "style" not in self._open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]
