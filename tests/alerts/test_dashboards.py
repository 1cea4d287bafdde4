"""Every expression of the dashboards returns data on a real Prometheus, as do the alerts in Grafana's own form."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ess_monitor.alerts import render, rule_groups
from ess_monitor.alerts.rules import PREFIX, Alert
from tests.alerts.dashboard_files import DASHBOARDS, asked, label_values, read
from tests.alerts.helpers import ALERTS
from tests.alerts.live import JOB, LAYERS, RUN_ID, SETTINGS, Server, eventually, prometheus, run_in_trouble

pytestmark = pytest.mark.servers

VALUES = {
    "$__rate_interval": "5s",
    "$__range": "30s",
    "$job": JOB,
    "$run_id": RUN_ID,
    "$layer": LAYERS[0],
}
"""What Grafana would put in; four scrapes and one are the shortest interval that it chooses."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("dashboards")
    targets = folder / "targets"
    targets.mkdir()
    with run_in_trouble(targets), prometheus(folder, targets) as server:
        yield server


def _filled_in(expr: str) -> str:
    for variable, value in VALUES.items():
        expr = expr.replace(variable, value)
    assert "$" not in expr, expr
    return expr


def test_every_expression_returns_data(server: Server) -> None:
    expressions = {
        # Without the zero that stands in for nothing: what stands before it must find something by itself.
        place: _filled_in(expr).removesuffix(" or vector(0)")
        for path in DASHBOARDS
        for place, expr, _ in asked(read(path))
    }
    assert len(expressions) > 60
    empty: dict[str, str] = dict(expressions)

    def all_have_data() -> bool:
        for place in [place for place, expr in empty.items() if _has_numbers(server.query(expr))]:
            del empty[place]
        return not empty

    assert eventually(all_have_data), "\n".join(f"{place}: {expr}" for place, expr in empty.items())


def _has_numbers(result: list[dict[str, Any]]) -> bool:
    return any(series["value"][1] not in ("NaN", "+Inf", "-Inf") for series in result)


def test_every_variable_offers_the_value_that_is_there(server: Server) -> None:
    expected = {"job": {JOB}, "run_id": {RUN_ID}, "layer": set(LAYERS)}
    for path in DASHBOARDS:
        for variable, series, label in label_values(read(path)):
            offered = {found["metric"][label] for found in server.query(_filled_in(series))}
            assert offered == expected[variable], f"{path.name}: {variable}"


def test_the_condition_of_a_layer_is_the_number_of_its_name(server: Server) -> None:
    dashboard = read(ALERTS / "grafana/dashboards/ess-monitor-run.json")
    (panel,) = (panel for panel in dashboard["panels"] if panel["title"] == "Condition by layer")
    names = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]
    expr = _filled_in(panel["targets"][0]["expr"])

    def shown() -> dict[str, str]:
        return {found["metric"]["layer"]: names[found["value"][1]]["text"] for found in server.query(expr)}

    expected = dict(zip(LAYERS, ("collapsed", "collapsed", "saturated"), strict=True))
    assert eventually(lambda: shown() == expected), shown()


def test_an_intervention_is_marked_when_it_happened(server: Server) -> None:
    dashboard = read(ALERTS / "grafana/dashboards/ess-monitor-run.json")
    (mark,) = (mark for mark in dashboard["annotations"]["list"] if mark["name"] == "Interventions")
    (found,) = server.query(_filled_in(mark["expr"]))
    assert found["metric"] == {"run_id": RUN_ID, "action": "pull_to_identity"}
    assert abs(float(found["value"][1]) / 1000 - time.time()) < 60


def test_alerts_in_grafanas_form_find_what_those_of_prometheus_find(server: Server) -> None:
    alerts = {
        PREFIX + rule.name: rule.expr
        for group in rule_groups(SETTINGS)
        for rule in group.rules
        if isinstance(rule, Alert)
    }
    managed = yaml.safe_load(render(SETTINGS)["grafana/provisioning/alerting/ess_monitor.yml"])
    queries = {
        rule["title"]: rule["data"][0]["model"]["expr"] for group in managed["groups"] for rule in group["rules"]
    }
    assert list(queries) == list(alerts)
    recorded = {name for name, expr in alerts.items() if re.search(r"\b(run|rank|run_layer):", expr)}
    assert len(recorded) == 6
    firing: set[str] = set()
    differing: dict[str, Any] = {}

    def recorded_ones_fire_and_all_agree() -> bool:
        moment = time.time() - 1  # of which every sample has been written
        firing.clear()
        differing.clear()
        for name, expr in alerts.items():
            found, again = (_label_sets(server.query(query, moment)) for query in (expr, queries[name]))
            if found:
                firing.add(name)
            if found != again:
                differing[name] = (found, again)
        return recorded <= firing and not differing

    assert eventually(recorded_ones_fire_and_all_agree), (recorded - firing, differing)
    assert len(firing) >= 10


def _label_sets(result: list[dict[str, Any]]) -> set[frozenset[tuple[str, str]]]:
    return {
        frozenset((label, value) for label, value in series["metric"].items() if label != "__name__")
        for series in result
    }


def test_a_panel_of_the_fleet_draws_twenty_runs_at_most_those_that_need_a_look(tmp_path: Path) -> None:
    def name(run: int) -> str:
        return f"run-{run:02d}"

    records = {
        "run:ess_monitor_state_utilization:ratio": lambda value: value < 20,
        "run:ess_monitor_layers_collapsed:ratio": lambda value: value >= 10,
        "rank:ess_monitor_steps:rate5m": lambda value: value < 20,
        "rank:ess_monitor_overhead:ratio_rate15m": lambda value: value >= 10,
    }
    dashboard = read(ALERTS / "grafana/dashboards/ess-monitor-fleet.json")
    curves = [panel["targets"][0]["expr"] for panel in dashboard["panels"] if panel["type"] == "timeseries"]
    tests = []
    for record, is_shown in records.items():
        (expr,) = (expr for expr in curves if record in expr)
        # A maximum over ranks keeps nothing but the run.
        kept = f'{record}{{job="{JOB}",' if record.startswith("run:") else "{"
        shown = [{"labels": f'{kept}run_id="{name(run)}"}}', "value": run} for run in range(30) if is_shown(run)]
        tests.append({"expr": _filled_in(expr).replace(f'run_id=~"{RUN_ID}"', 'run_id=~".+"'), "eval_time": "2m"})
        tests[-1]["exp_samples"] = shown
    series = [
        {"series": f'{record}{{job="{JOB}",run_id="{name(run)}"}}', "values": f"{run}+0x8"}
        for record in records
        for run in range(30)
    ]
    path = tmp_path / "fleet.yml"
    group = {"interval": "15s", "input_series": series, "promql_expr_test": tests}
    path.write_text(yaml.safe_dump({"rule_files": [], "evaluation_interval": "15s", "tests": [group]}))
    answer = subprocess.run(["promtool", "test", "rules", path], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stdout + answer.stderr
