"""Nothing that is shipped or documented names a metric, a label or a setting that does not exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from ess_monitor.alerts import AlertsConfig, render, rule_groups
from ess_monitor.alerts.cases import AlertCase, RecordCase, render_tests, rule_cases
from ess_monitor.alerts.rules import PREFIX, Alert, RecordingRule
from ess_monitor.config import MonitorConfig
from ess_monitor.exporters import PrometheusConfig
from ess_monitor.records import PARTS
from tests.alerts.helpers import ALERTS, DOCS, TARGET_LABELS, Served, expressions, problems, served, unknown_groupings

RULES = [rule for group in rule_groups(AlertsConfig()) for rule in group.rules]
RECORDED = {rule.name for rule in RULES if isinstance(rule, RecordingRule)}
ALERT_NAMES = [rule.name for rule in RULES if isinstance(rule, Alert)]
RULE_TESTS = [yaml.safe_load(text) for text in render_tests(AlertsConfig()).values()]
RUNBOOKS = sorted((ALERTS / "runbooks").glob("*.md"))
TEXTS = [
    *sorted(ALERTS.glob("prometheus/*.yml")),
    *sorted(ALERTS.glob("prometheus/tests/*.yml")),
    *sorted(path for path in ALERTS.glob("grafana/**/*") if path.suffix in (".json", ".yml", ".yaml")),
    *sorted(path for path in ALERTS.glob("compose/**/*") if path.suffix in (".yml", ".yaml")),
    *RUNBOOKS,
    *sorted(DOCS.rglob("*.md")),
]
"""Everything that may speak of metrics."""


@pytest.fixture(scope="module")
def known() -> Served:
    return served()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: "/".join(path.parts[-2:]))
def test_every_metric_and_label_that_is_named_is_served(path: Path, known: Served) -> None:
    text = path.read_text(encoding="utf-8") if path.suffix != ".json" else "\n".join(expressions(path))
    assert problems(text, known, RECORDED) == []
    assert [label for expression in expressions(path) for label in unknown_groupings(expression, known)] == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rate(ess_monitor_step_total[5m])", "metric ess_monitor_step_total"),
        ("see `ess_monitor_state_usage_ratio`", "metric ess_monitor_state_usage_ratio"),
        ('ess_monitor_state_capacity{head="1"}', "label head of ess_monitor_state_capacity"),
        ('ess_monitor_run_status{status="runing"}', "ess_monitor_run_status{status='runing'}"),
        (
            'ess_monitor_layer_condition{condition=~"collapsed|full"}',
            "ess_monitor_layer_condition{condition='full'}",
        ),
        ("run:ess_monitor_nothing:ratio > 1", "recorded series run:ess_monitor_nothing:ratio"),
    ],
)
def test_what_is_not_served_is_found(text: str, problem: str, known: Served) -> None:
    assert problems(text, known, RECORDED) == [problem]


def test_a_grouping_by_a_label_that_no_series_has_is_found(known: Served) -> None:
    assert unknown_groupings("sum by (run_id, node) (up)", known) == ["label node in (run_id, node)"]
    assert unknown_groupings("sum without (rank) (up) / on (job, run_id) group_left () up", known) == []


def test_the_glossary_has_every_metric_with_its_type_and_labels(known: Served) -> None:
    section = (DOCS / "metrics.md").read_text(encoding="utf-8").split("\n## Prometheus\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]*)\|", section, re.MULTILINE)
    documented = {name: (kind, frozenset(re.findall(r"\w+", labels))) for name, kind, labels in rows}
    exported = {}
    for name, (kind, labels) in known.families.items():
        short = name.removeprefix("ess_monitor_")
        if short.endswith("_info"):
            kind = "info"
            labels = frozenset({"versions"}) if short == "build_info" else labels  # one label per package
        exported[short] = (kind, labels)
    assert documented == exported


def test_no_metric_carries_a_label_that_belongs_to_the_target(known: Served) -> None:
    assert {name for name, labels in known.samples.items() if TARGET_LABELS & set(labels)} == set()


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    assert sorted(path.stem for path in RUNBOOKS) == sorted(PREFIX + name for name in ALERT_NAMES)
    links = {rule.runbook_url for rule in RULES if isinstance(rule, Alert)}
    assert links == {f"runbooks/{path.name}" for path in RUNBOOKS}


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda path: path.stem)
def test_a_runbook_has_its_sections_and_queries(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# {path.stem}\n")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["Meaning", "Impact", "Diagnosis", "Mitigation", "False positives"]
    assert all(len(section.split()) > 15 for section in re.split(r"^## .+$", text, flags=re.MULTILINE)[1:])
    assert len(expressions(path)) >= 2
    (rule,) = (rule for rule in RULES if PREFIX + rule.name == path.stem)
    assert isinstance(rule, Alert)
    assert f"\nSeverity: {rule.severity}. " in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (path.parent / link).exists(), link


def _fields(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Names of the settings, with their section and without."""
    names = set()
    for name, field in model.model_fields.items():
        names |= {name, prefix + name}
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                names |= _fields(part, f"{prefix}{name}.")
    return names


_SECTIONS = ("autopilot", "capture", "diagnosis", "evidence", "layers", "runtime")


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda path: path.stem)
def test_a_runbook_names_only_settings_that_exist(path: Path) -> None:
    named = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)(?:: [^`]*)?`", path.read_text(encoding="utf-8")))
    settings = {name for name in named if name.split(".")[0] in _SECTIONS}
    settings |= {name for name in named if re.search(r"_(seconds|ratio|scrape|actions|steps|layers)$", name)}
    assert settings - _fields(MonitorConfig) - _fields(AlertsConfig) - _fields(PrometheusConfig) == set()


def test_the_settings_that_a_runbook_gives_a_value_have_that_value() -> None:
    defaults = {**AlertsConfig().model_dump(), **_flat(MonitorConfig())}
    stated = [
        (name, float(value))
        for path in RUNBOOKS
        for name, value in re.findall(r"`([a-z_.]+)` \((\d[\d.]*)\)", path.read_text(encoding="utf-8"))
    ]
    assert len(stated) >= 3
    assert [(name, value) for name, value in stated if defaults[name] != value] == []


def _flat(config: BaseModel, prefix: str = "") -> dict[str, object]:
    values: dict[str, object] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        values |= _flat(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {prefix + name: value}
    return values


@pytest.mark.parametrize("rule", [rule for rule in RULES if isinstance(rule, Alert)], ids=lambda rule: rule.name)
def test_an_alert_has_a_test_in_which_it_is_silent_just_before_it_fires_and_resolves(rule: Alert) -> None:
    cases = [
        case
        for file in rule_cases(AlertsConfig()).values()
        for case in file
        if isinstance(case, AlertCase) and case.alert == rule.name
    ]
    severities = {
        alert["exp_labels"]["severity"]
        for text in RULE_TESTS
        for case in text["tests"]
        for moment in case.get("alert_rule_test", ())
        for alert in moment["exp_alerts"]
        if moment["alertname"] == PREFIX + rule.name
    }
    assert severities == {rule.severity}
    complete = []
    for case in cases:
        fires = [bool(firings) for _, firings in sorted(case.expected.items())]
        complete.append(fires[0] is False and True in fires and fires[-1] is False)
    assert any(complete)


def test_every_part_of_the_monitor_has_a_test_of_what_is_said_when_it_is_off() -> None:
    cases = [case for case in rule_cases(AlertsConfig())["monitor.yml"] if isinstance(case, AlertCase)]
    off = {f.labels.get("part") for case in cases for firings in case.expected.values() for f in firings}
    assert off - {None} == set(PARTS)


def test_every_recording_rule_has_a_test() -> None:
    cases = [case for file in rule_cases(AlertsConfig()).values() for case in file if isinstance(case, RecordCase)]
    assert {record for case in cases for record, samples in case.samples.items() if samples} == RECORDED


def test_every_rule_is_documented_and_no_ratio_is_averaged() -> None:
    rules = [
        rule
        for group in yaml.safe_load((ALERTS / "prometheus/ess_monitor.rules.yml").read_text())["groups"]
        for rule in group["rules"]
    ]
    for rule in rules:
        assert not re.search(r"\bavg(_over_time)?\b", rule["expr"])
        if "alert" in rule:
            assert rule["alert"].startswith(PREFIX)
            assert rule["labels"]["severity"] in {"critical", "warning", "info"}
            assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        else:
            assert re.fullmatch(r"(run|rank|run_layer):ess_monitor_[a-z_]+:[a-z0-9_]+", rule["record"])


def test_what_is_said_of_a_run_holds_only_while_a_process_of_it_runs() -> None:
    managed = yaml.safe_load(render(AlertsConfig())["grafana/provisioning/alerting/ess_monitor.yml"])
    written_out = {
        rule["title"].removeprefix(PREFIX): rule["data"][0]["model"]["expr"]
        for group in managed["groups"]
        for rule in group["rules"]
    }
    assert list(written_out) == ALERT_NAMES
    runs = r'on \(job, instance, run_id, rank\)\s+[(\s]*(max_over_time\()?ess_monitor_run_status\{[^}]*status="running"'
    assert [name for name, expr in written_out.items() if not re.search(runs, expr)] == ["TargetDown"]


def test_no_rule_repeats_a_threshold_of_the_diagnosis() -> None:
    for rule in RULES:
        assert "condition_threshold_ratio" not in rule.expr
        if "utilization" in rule.expr and isinstance(rule, Alert):
            assert rule.name == "RankDivergence"  # compares ranks, not a layer with a line
