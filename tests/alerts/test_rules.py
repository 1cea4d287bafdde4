"""The rules, their unit tests and the configurations, judged by the real promtool, amtool and Alertmanager."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from ess_monitor.alerts import AlertsConfig, export, render
from ess_monitor.alerts.rules.base import dump
from tests.alerts.helpers import ALERTS, expressions, need
from tests.exporters.helpers import free_port

pytestmark = pytest.mark.servers

CONFIGS = {
    "defaults": AlertsConfig(),
    "everything_else": AlertsConfig(
        job="llm/train",
        runbook_base_url="https://wiki.example.org/ess",
        condition_for_seconds=70,
        condition_keep_firing_seconds=10,
        most_layers_ratio=0.3,
        most_layers_for_seconds=7,
        divergence_ratio=0.15,
        divergence_for_seconds=95,
        flapping_actions=2,
        ineffective_for_seconds=1000,
        stalled_seconds=5_000,
        start_seconds=200,
        measurement_stale_seconds=100,
        overhead_ratio=0.5,
        overhead_for_seconds=100,
        export_errors_for_seconds=100,
        target_down_for_seconds=1,
        samples_per_scrape=1_000_000,
    ),
}


def _run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    answer = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, cwd=cwd)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer


@pytest.fixture(params=CONFIGS)
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    export(tmp_path, CONFIGS[request.param])
    return tmp_path


def test_promtool_has_nothing_to_say_about_the_rules(exported: Path) -> None:
    answer = _run("promtool", "check", "rules", "--lint=all", "--lint-fatal", *exported.glob("prometheus/*.rules.yml"))
    assert "SUCCESS: 25 rules found" in answer.stdout


def test_every_rule_passes_its_unit_tests(exported: Path) -> None:
    tests = sorted(exported.glob("prometheus/tests/*.yml"))
    answer = _run("promtool", "test", "rules", *tests)
    assert answer.stdout.count("SUCCESS") == len(tests) == 6


@pytest.mark.parametrize(
    ("old", "new", "file"),
    [
        ("for: 10m", "for: 11m", "layers.yml"),
        ("keep_firing_for: 5m", "keep_firing_for: 6m", "layers.yml"),
        ('outcome=~"failed|rolled_back"', 'outcome=~"rolled_back"', "interventions.yml"),
        ('outcome=~"failed|rolled_back"', 'outcome=~"failed"', "interventions.yml"),
        ("> 900", "> 930", "run.yml"),
        ("> 3600", "> 3570", "run.yml"),
        (', condition!="unknown"', "", "layers.yml"),
        ("ess_monitor_layers{", "2 * ess_monitor_layers{", "monitor.yml"),
        ("ess_monitor_exporter_enabled{", 'ess_monitor_exporter_enabled{exporter="event_log", ', "monitor.yml"),
        ('eq . "diagnosis"', 'eq . "export"', "monitor.yml"),
        ("has collapsed", "collapsed", "layers.yml"),
        ("by (job, run_id)", "by (job)", "records.yml"),
        ('time() - ess_monitor_last_step_timestamp_seconds{job="ess_monitor"} <= 1800', "vector(1)", "lifecycle.yml"),
        ("finished|terminated", "finished", "lifecycle.yml"),
        ("max_over_time", "min_over_time", "lifecycle.yml"),
    ],
)
def test_a_rule_that_was_changed_fails_its_unit_tests(tmp_path: Path, old: str, new: str, file: str) -> None:
    files = render(AlertsConfig())
    rules = files["prometheus/ess_monitor.rules.yml"]
    assert old in rules
    (tmp_path / "tests").mkdir()
    (tmp_path / "ess_monitor.rules.yml").write_text(rules.replace(old, new))
    (tmp_path / "tests" / file).write_text(files[f"prometheus/tests/{file}"])
    answer = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "tests" / file], capture_output=True, text=True, timeout=120
    )
    assert answer.returncode != 0
    assert "FAILED" in answer.stdout + answer.stderr


def test_every_query_of_a_runbook_is_promql(tmp_path: Path) -> None:
    queries = [query for path in sorted(ALERTS.glob("runbooks/*.md")) for query in expressions(path)]
    assert len(queries) > 40
    rules = [{"record": f"query_{number}", "expr": query} for number, query in enumerate(queries)]
    path = tmp_path / "queries.yml"
    path.write_text(dump({"groups": [{"name": "runbooks", "rules": rules}]}))
    assert f"SUCCESS: {len(queries)} rules found" in _run("promtool", "check", "rules", path).stdout


def test_the_prometheus_example_is_a_configuration(exported: Path) -> None:
    _run("promtool", "check", "config", exported / "prometheus/prometheus.example.yml")


def test_run_and_rank_come_from_the_file_its_name_or_the_address(tmp_path: Path) -> None:
    shutil.copy(ALERTS / "prometheus/prometheus.example.yml", tmp_path)
    targets = tmp_path / "targets"
    targets.mkdir()
    shutil.copy(ALERTS / "prometheus/file_sd.example.json", targets / "all.json")
    (targets / "wla-7-b-3.json").write_text('[{"targets": ["h:1"]}]')
    (targets / "other.json").write_text('[{"targets": ["h:2"]}]')
    config = tmp_path / "prometheus.example.yml"
    answer = _run("promtool", "check", "service-discovery", "--timeout=2s", config, "ess_monitor", cwd=tmp_path)
    found = {
        target["labels"]["instance"]: (target["labels"]["run_id"], target["labels"]["rank"])
        for target in json.loads(answer.stdout)
    }
    assert found == {
        "10.0.0.7:9464": ("wla-7", "0"),
        "10.0.0.8:9464": ("wla-7", "1"),
        "h:1": ("wla-7-b", "3"),
        "h:2": ("h:2", "0"),
    }


def test_amtool_accepts_the_alertmanager_example(exported: Path) -> None:
    need("amtool", "prometheus-alertmanager")
    answer = _run("amtool", "check-config", exported / "alertmanager/alertmanager.yml")
    assert "3 inhibit rules" in answer.stdout


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        ("alertname=EssMonitorRunStalled severity=critical", "ess-monitor-page"),
        ("alertname=EssMonitorStateCollapsed severity=warning", "ess-monitor-chat"),
        ("alertname=EssMonitorCardinalityHigh severity=info", "ess-monitor-log"),
        ("alertname=DiskFull severity=critical", "default"),
    ],
)
def test_an_alert_is_routed_by_its_severity(labels: str, receiver: str) -> None:
    need("amtool", "prometheus-alertmanager")
    config = ALERTS / "alertmanager/alertmanager.yml"
    answer = _run("amtool", "config", "routes", "test", f"--config.file={config}", *labels.split())
    assert answer.stdout.split() == [receiver]


def test_what_is_said_already_is_hidden_of_a_rank_that_is_down_a_collapsed_run_and_an_exporter_that_is_off(
    tmp_path: Path,
) -> None:
    need("prometheus-alertmanager", "prometheus-alertmanager")

    def alert(name: str, **labels: str) -> dict[str, Any]:
        return {"labels": {"alertname": f"EssMonitor{name}", "job": "ess_monitor", **labels}}

    sent = [
        alert("TargetDown", run_id="a", rank="1", instance="h:1"),
        alert("MeasurementStale", run_id="a", rank="1", instance="h:1"),
        alert("MeasurementStale", run_id="a", rank="0", instance="h:0"),
        alert("StateSaturated", run_id="a", layer="x"),
        alert("MostLayersCollapsed", run_id="b"),
        alert("StateCollapsed", run_id="b", layer="x"),
        alert("StateCollapsed", run_id="a", layer="x"),
        alert("RunStalled", run_id="b", rank="1", instance="h:2"),
        alert("PartOff", run_id="c", rank="0", exporter="event_log"),
        alert("PartOff", run_id="c", rank="1", part="capture"),
        alert("ExportErrors", run_id="c", rank="0", exporter="event_log"),
        alert("ExportErrors", run_id="c", rank="0", exporter="tensorboard"),
        alert("ExportErrors", run_id="c", rank="1", exporter="event_log"),
        {"labels": {"alertname": "DiskFull", "job": "ess_monitor", "run_id": "a", "rank": "1"}},
    ]
    with _alertmanager(tmp_path) as url:
        _http(f"{url}/api/v2/alerts", sent)
        hidden = _hidden(url, len(sent))
    assert hidden == {
        ("EssMonitorMeasurementStale", "a", "1", ""),
        ("EssMonitorStateCollapsed", "b", "", ""),
        ("EssMonitorExportErrors", "c", "0", "event_log"),
    }


def _hidden(url: str, count: int) -> set[tuple[str, ...]]:
    """The inhibited alerts, once every alert has been looked at; `inhibited=true` lists the hidden ones as well."""
    deadline = time.monotonic() + 30
    while True:
        alerts = _http(f"{url}/api/v2/alerts?inhibited=true")
        states = [alert["status"]["state"] for alert in alerts]
        if len(alerts) == count and "unprocessed" not in states:
            return {
                tuple(alert["labels"].get(label, "") for label in ("alertname", "run_id", "rank", "exporter"))
                for alert in alerts
                if alert["status"]["inhibitedBy"]
            }
        assert time.monotonic() < deadline, alerts
        time.sleep(0.1)


@contextmanager
def _alertmanager(folder: Path) -> Iterator[str]:
    """A real Alertmanager with the shipped routes and inhibitions. It looks at a group only after `group_wait`."""
    config = yaml.safe_load((ALERTS / "alertmanager/alertmanager.yml").read_text())
    routes = [config["route"], *config["route"]["routes"], *config["route"]["routes"][0]["routes"]]
    for route in routes:
        route["group_wait"] = "0s"
    for receiver in config["receivers"]:
        receiver.pop("webhook_configs", None)
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus-alertmanager",
                f"--config.file={folder / 'alertmanager.yml'}",
                f"--storage.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--cluster.listen-address=",
            ],
            stdout=log,
            stderr=log,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 30
        while not _ready(url):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "Alertmanager was not ready within 30 s"
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _http(url: str, content: Any = None) -> Any:
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        body = response.read()
    return json.loads(body) if body else None
