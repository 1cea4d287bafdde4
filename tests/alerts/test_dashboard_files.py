"""The dashboards' files: written from the tables beside them, and complete wherever a reader looks."""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

import pytest

from ess_monitor.alerts import AlertsConfig, render
from ess_monitor.alerts.dashboards import render_dashboards
from tests.alerts.dashboard_files import DASHBOARDS, asked, panels, read
from tests.alerts.helpers import ALERTS

BY_UID = {path.stem: read(path) for path in DASHBOARDS}
ALL = pytest.mark.parametrize("dashboard", BY_UID.values(), ids=BY_UID)
UNITS = {"short", "none", "percentunit", "s"}


def test_the_committed_dashboards_are_what_the_tables_give() -> None:
    committed = {path.name: path.read_text(encoding="utf-8") for path in DASHBOARDS}
    assert render_dashboards("ess_monitor") == committed, "run ess_monitor.alerts.export('alerts', overwrite=True)"


@ALL
def test_a_dashboard_says_what_it_is_and_can_be_linked_to(dashboard: dict[str, Any]) -> None:
    assert re.fullmatch(r"[a-z-]{1,40}", dashboard["uid"])
    assert dashboard["title"].startswith("ESS Monitor / ")
    assert len(dashboard["description"]) > 30
    assert dashboard["tags"] == ["ess-monitor"]
    assert "id" not in dashboard or dashboard["id"] is None


@ALL
def test_source_job_and_run_are_variables(dashboard: dict[str, Any]) -> None:
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert list(variables)[:3] == ["datasource", "job", "run_id"]
    assert variables["datasource"]["query"] == "prometheus"
    assert all(variable["label"] and variable["description"] for variable in variables.values())
    uses = [panel["datasource"] for panel in panels(dashboard)]
    uses += [target["datasource"] for panel in panels(dashboard) for target in panel["targets"]]
    uses += [mark["datasource"] for mark in dashboard["annotations"]["list"]]
    uses += [variable["datasource"] for variable in variables.values() if variable["type"] == "query"]
    assert all(use == {"type": "prometheus", "uid": "${datasource}"} for use in uses)
    named = set(re.findall(r"\$(\w+)", "\n".join(expr for _, expr, _ in asked(dashboard))))
    assert named - {"__rate_interval", "__range"} <= set(variables)


@ALL
def test_every_panel_has_title_description_unit_and_a_query(dashboard: dict[str, Any]) -> None:
    for panel in panels(dashboard):
        assert panel["title"], panel["id"]
        assert len(panel["description"]) > 15, panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert panel["targets"], panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(refs) == len(set(refs)), panel["title"]


@ALL
def test_panel_ids_are_set_and_unique(dashboard: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    assert ids == sorted(ids)
    assert all(100 <= number < 1000 for number in ids)


@ALL
def test_no_panel_lies_on_another_or_over_the_edge(dashboard: dict[str, Any]) -> None:
    def apart(one: dict[str, int], other: dict[str, int]) -> bool:
        return (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )

    places = {panel["title"]: panel["gridPos"] for panel in dashboard["panels"]}
    assert len(places) == len(dashboard["panels"]), "two panels have one title"
    assert [pair for pair in combinations(places, 2) if not apart(places[pair[0]], places[pair[1]])] == []
    assert [title for title, place in places.items() if place["x"] + place["w"] > 24] == []


@ALL
def test_counters_are_read_as_rates_over_an_interval_that_grafana_chooses(dashboard: dict[str, Any]) -> None:
    for place, expr, instant in asked(dashboard):
        counters = len(re.findall(r"\bess_monitor_\w+_(?:total|bucket|sum|count)\b(?=\{)", expr))
        rates = re.findall(
            r"\b(rate|increase)\(ess_monitor_\w+_(?:total|bucket|sum|count)\{[^}]*\}\[([^\]]+)\]\)", expr
        )
        assert counters == len(rates), f"{place}: a counter without rate()"
        for function, window in rates:
            whole_range = instant and function == "increase"
            assert window == ("$__range" if whole_range else "$__rate_interval"), place
        last = len(re.findall(r"last_over_time\((?:run|rank):[\w:]+\{[^}]*\}\[\$__range\] @ end\(\)\)", expr))
        assert len(re.findall(r"\[[^\]]+\]", expr)) == len(rates) + last, f"{place}: a range that is no counter's"


@ALL
def test_every_query_keeps_to_its_job_and_run(dashboard: dict[str, Any]) -> None:
    for place, expr, _ in asked(dashboard):
        selectors = re.findall(r"\{([^{}]*)\}", expr)
        assert selectors, place
        for selector in selectors:
            assert selector.startswith('job="$job", run_id='), place


@ALL
def test_no_ratio_is_averaged_and_no_threshold_of_an_alert_is_repeated(dashboard: dict[str, Any]) -> None:
    for place, expr, _ in asked(dashboard):
        assert not re.search(r"\bavg(_over_time)?\b", expr), place
    for panel in panels(dashboard):
        steps = panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])
        assert all(step["value"] in (None, 1) for step in steps), panel["title"]


@ALL
def test_interventions_and_alerts_are_marked_on_the_curves(dashboard: dict[str, Any]) -> None:
    marks = {mark["name"]: mark for mark in dashboard["annotations"]["list"]}
    assert set(marks) == {"Interventions", "Firing alerts"}
    assert all(mark["enable"] for mark in marks.values())
    # The value is the time of the mark, and Grafana takes it in milliseconds.
    assert marks["Interventions"]["useValueForTime"] is True
    assert marks["Interventions"]["expr"].endswith("* 1000")


def test_links_lead_to_dashboards_and_variables_that_exist() -> None:
    for dashboard in BY_UID.values():
        links = re.findall(r"/d/([\w-]+)\?([^\"\\]*)", str(dashboard["panels"]).replace("'", '"'))
        for uid, query in links:
            variables = {variable["name"] for variable in BY_UID[uid]["templating"]["list"]}
            assert (
                set(re.findall(r"\bvar-(\w+)=", query)) | set(re.findall(r"\{(\w+):queryparam\}", query)) <= variables
            )
        assert links or dashboard["uid"] == "ess-monitor-layer"


def test_an_export_opens_on_its_job_and_is_the_same_otherwise() -> None:
    files = render(AlertsConfig(job="llm/train"))
    for path in DASHBOARDS:
        name = path.relative_to(ALERTS).as_posix()
        assert render(AlertsConfig())[name] == path.read_text(encoding="utf-8")
        assert files[name].replace("llm/train", "ess_monitor") == path.read_text(encoding="utf-8")
        assert files[name].count('"llm/train"') == 2


def test_the_folder_holds_the_three_dashboards() -> None:
    assert {path.stem: read(path)["uid"] for path in DASHBOARDS} == {
        name: name for name in ("ess-monitor-fleet", "ess-monitor-layer", "ess-monitor-run")
    }
