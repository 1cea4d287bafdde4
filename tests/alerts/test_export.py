"""What is exported: the committed files by default, and the same for another job and other thresholds."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import yaml

from ess_monitor.alerts import AlertsConfig, export, render
from ess_monitor.alerts.export import render_generated
from ess_monitor.errors import ConfigError
from tests.alerts.helpers import ALERTS

MODULES = ("config", "export", "cases", "cases.base", "rules", "rules.base", "rules.grafana")


def test_the_committed_rules_and_tests_are_what_the_defaults_give() -> None:
    rendered = render_generated(AlertsConfig())
    committed = {
        path.relative_to(ALERTS).as_posix(): path.read_text(encoding="utf-8")
        for pattern in (
            "grafana/dashboards/*",
            "grafana/provisioning/alerting/*",
            "prometheus/*.rules.yml",
            "prometheus/tests/*",
        )
        for path in ALERTS.glob(pattern)
    }
    assert committed == rendered, "run ess_monitor.alerts.export('alerts', overwrite=True)"


def test_an_export_with_the_defaults_is_the_folder_as_it_is_committed(tmp_path: Path) -> None:
    paths = export(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in paths} == set(render(AlertsConfig()))
    for path in paths:
        assert path.read_bytes() == (ALERTS / path.relative_to(tmp_path)).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} >= {"alertmanager", "prometheus", "runbooks"}
    assert not list(tmp_path.rglob("*.py"))


def test_another_job_is_selected_everywhere() -> None:
    files = render(AlertsConfig(job="llm/train"))
    left = [name for name, text in files.items() if 'job="ess_monitor"' in text or 'job=\\"ess_monitor\\"' in text]
    assert left == []
    rules = yaml.safe_load(files["prometheus/ess_monitor.rules.yml"])
    expressions = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    assert all('job="llm/train"' in expression for expression in expressions)
    (scrape,) = yaml.safe_load(files["prometheus/prometheus.example.yml"])["scrape_configs"]
    assert scrape["job_name"] == "llm/train"
    endpoint = yaml.safe_load(files["prometheus/podmonitor.example.yml"])["spec"]["podMetricsEndpoints"][0]
    assert {"targetLabel": "job", "replacement": "llm/train"} in endpoint["relabelings"]


def test_thresholds_reach_the_rules_and_where_the_runbooks_are_reaches_the_annotations() -> None:
    text = render(
        AlertsConfig(stalled_seconds=5400, condition_for_seconds=90, runbook_base_url="https://wiki.example.org/ess/")
    )["prometheus/ess_monitor.rules.yml"]
    rules = {rule.get("alert"): rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]}
    assert "> 5400" in rules["EssMonitorRunStalled"]["expr"]
    assert "1h30m between two steps" in rules["EssMonitorRunStalled"]["annotations"]["description"]
    assert rules["EssMonitorStateCollapsed"]["for"] == "1m30s"
    url = rules["EssMonitorStateCollapsed"]["annotations"]["runbook_url"]
    assert url == "https://wiki.example.org/ess/EssMonitorStateCollapsed.md"


def test_a_file_that_was_edited_is_not_overwritten_unasked(tmp_path: Path) -> None:
    export(tmp_path)
    export(tmp_path)  # nothing differs
    edited = tmp_path / "alertmanager/alertmanager.yml"
    edited.write_text("route: {receiver: mine}\n")
    rules = tmp_path / "prometheus/ess_monitor.rules.yml"
    before = rules.read_text()
    with pytest.raises(ConfigError, match=r"alertmanager/alertmanager\.yml.*overwrite=True"):
        export(tmp_path, stalled_seconds=60)
    assert (edited.read_text(), rules.read_text()) == ("route: {receiver: mine}\n", before)
    export(tmp_path, overwrite=True)
    assert "ess-monitor-page" in edited.read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stalled_secs": 1}, r"stalled_secs: unknown setting; did you mean stalled_seconds\?"),
        ({"stalled_seconds": 0}, r"stalled_seconds: .*greater than 0 \(got 0\)"),
        ({"overhead_ratio": 1.5}, r"overhead_ratio: .*less than 1"),
        ({"job": 'a"} or up{x="'}, r"job: "),
        ({"job": "two\nlines"}, r"job: "),
        ({"job": ""}, r"job: "),
        ({"runbook_base_url": "https://x/{{ y }}"}, r"runbook_base_url: "),
    ],
)
def test_a_setting_that_cannot_be_is_an_error_that_names_it(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


def test_settings_come_on_top_of_a_config(tmp_path: Path) -> None:
    export(tmp_path, AlertsConfig(job="llm", stalled_seconds=60), stalled_seconds=120)
    text = (tmp_path / "prometheus/ess_monitor.rules.yml").read_text()
    assert 'ess_monitor_last_step_timestamp_seconds{job="llm"} > 120' in text


def test_a_directory_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match=r"directory: cannot write .*file"):
        export(blocked)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_module_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"ess_monitor.alerts.{name}"))
    assert (result.failed, result.attempted > 0) == (0, True)
