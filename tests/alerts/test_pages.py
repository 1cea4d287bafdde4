"""The pages on alerts and on Grafana say what the rules, the settings and the dashboards are."""

from __future__ import annotations

import re

import yaml

from ess_monitor.alerts import AlertsConfig, render
from ess_monitor.exporters.event_log.schema import event_schema
from tests.alerts.dashboard_files import DASHBOARDS, panels, read
from tests.alerts.helpers import ALERTS, DOCS

ALERTS_PAGE = (DOCS / "alerts.md").read_text(encoding="utf-8")
METRICS_PAGE = (DOCS / "metrics.md").read_text(encoding="utf-8")
GRAFANA_PAGE = (DOCS / "grafana.md").read_text(encoding="utf-8")


def test_the_table_has_every_alert_with_its_runbook_waiting_time_and_severity() -> None:
    rows = re.findall(r"^\| \[(\w+)\]\(([^)]+)\) \| [^|]+ \| (\w+) \| (\w+) \|$", ALERTS_PAGE, re.MULTILINE)
    rules = [
        rule
        for group in yaml.safe_load((ALERTS / "prometheus/ess_monitor.rules.yml").read_text())["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]
    expected = {
        (rule["alert"], rule["annotations"]["runbook_url"], rule.get("for", "0s"), rule["labels"]["severity"])
        for rule in rules
    }
    assert set(rows) == expected
    assert len(rows) == len(expected)


def test_the_settings_are_all_there_with_their_defaults() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", ALERTS_PAGE.split("## Settings")[1], re.MULTILINE))
    assert rows == {name: str(value) for name, value in AlertsConfig().model_dump().items()}


def test_the_glossary_says_of_every_metric_and_event_what_to_do() -> None:
    meanings, actions = (
        METRICS_PAGE.split(f"## {title}")[1].split("\n## ")[0] for title in ("Prometheus", "What to do about them")
    )
    first_cells = re.findall(r"^\| (`[^|]+`) \| [^|]+ \| [^|]+ \|$", actions, re.MULTILINE)
    metrics = re.findall(r"^\| `(\w+)` \|", meanings, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(first_cells))) == sorted(metrics)
    events = re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \|$", METRICS_PAGE.split("## Event log")[1], re.MULTILINE)
    assert sorted(events) == sorted(event_schema()["discriminator"]["mapping"])


def test_the_page_on_grafana_names_dashboards_panels_and_files_that_exist() -> None:
    boards = [read(path) for path in DASHBOARDS]
    titles = re.findall(r"^\| (ESS Monitor / \w+) \|", GRAFANA_PAGE, re.MULTILINE)
    assert sorted(titles) == sorted(board["title"] for board in boards)
    named = set(re.findall(r"(?<!\*)\*([A-Z][^*\n]+)\*(?!\*)", GRAFANA_PAGE))
    assert len(named) >= 3
    assert named <= {panel["title"] for board in boards for panel in panels(board)}
    files = set(render(AlertsConfig()))
    paths = re.findall(r"`((?:prometheus|grafana|alertmanager)/[\w./*-]+)`", GRAFANA_PAGE + ALERTS_PAGE)
    assert len(paths) >= 8
    for path in paths:
        pattern = re.escape(path).replace(r"\*", r"[^/]+") + (".+" if path.endswith("/") else "")
        assert any(re.fullmatch(pattern, name) for name in files), path
