"""Provisioning and compose files: they agree with the rules, with the dashboards and with each other."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ess_monitor.alerts import AlertsConfig, render, rule_groups
from tests.alerts.helpers import ALERTS

OTHER = AlertsConfig(
    job="llm/train", grafana_datasource_uid="thanos", stalled_seconds=5400, runbook_base_url="https://x"
)
CONFIGS = pytest.mark.parametrize("config", [AlertsConfig(), OTHER], ids=["defaults", "other"])
COMPOSE = ALERTS / "compose/compose.yml"


def _managed(config: AlertsConfig) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(render(config)["grafana/provisioning/alerting/ess_monitor.yml"])
    return content


def _prometheus_rules(config: AlertsConfig) -> dict[str, dict[str, Any]]:
    content = yaml.safe_load(render(config)["prometheus/ess_monitor.rules.yml"])
    return {rule["alert"]: rule for group in content["groups"] for rule in group["rules"] if "alert" in rule}


@CONFIGS
def test_a_grafana_managed_alert_says_and_waits_as_that_of_prometheus(config: AlertsConfig) -> None:
    expected = _prometheus_rules(config)
    managed = {rule["title"]: rule for group in _managed(config)["groups"] for rule in group["rules"]}
    assert list(managed) == list(expected)
    assert len(managed) == 15
    for name, rule in managed.items():
        original = expected[name]
        assert rule["labels"] == original["labels"]
        assert rule["for"] == original.get("for", "0s")
        assert rule.get("keepFiringFor") == original.get("keep_firing_for")
        texts = {key: text.replace("$values.query.Value", "$value") for key, text in rule["annotations"].items()}
        assert texts == original["annotations"]
        assert not any(re.search(r"\$value\b|\$\{", text) for text in rule["annotations"].values())
        assert not rule["isPaused"]


@CONFIGS
def test_a_grafana_managed_alert_needs_no_recording_rule_and_fires_on_any_value(config: AlertsConfig) -> None:
    for group in _managed(config)["groups"]:
        for rule in group["rules"]:
            query, there, fires = rule["data"]
            assert query["datasourceUid"] == query["model"]["datasource"]["uid"] == config.grafana_datasource_uid
            assert not re.search(r"\b(run|rank|run_layer):", query["model"]["expr"])
            selectors = re.findall(r"\{([^{}]*)\}", query["model"]["expr"])
            assert selectors
            assert all(selector.startswith(f'job="{config.job}"') for selector in selectors)
            assert query["model"]["instant"] is True
            # `up == 0` is 0 where it fires: being there counts, not the value.
            assert there["model"]["expression"] == "is_number($query) || is_nan($query) || is_inf($query)"
            assert fires["model"]["expression"] == there["refId"]
            assert (rule["condition"], rule["noDataState"]) == (fires["refId"], "OK")


def test_two_jobs_can_be_provisioned_side_by_side() -> None:
    first, second = _managed(AlertsConfig()), _managed(OTHER)
    uids = [rule["uid"] for content in (first, second) for group in content["groups"] for rule in group["rules"]]
    assert len(set(uids)) == len(uids) == 30
    assert all(re.fullmatch(r"[a-z0-9-]{1,40}", uid) for uid in uids)
    folders = {group["folder"] for content in (first, second) for group in content["groups"]}
    assert folders == {"ESS Monitor", "ESS Monitor llm-train"}


def test_groups_are_those_of_prometheus_at_an_interval_that_grafana_takes() -> None:
    groups = _managed(AlertsConfig())["groups"]
    assert [group["name"] for group in groups] == [group.name for group in rule_groups(AlertsConfig())]
    assert {group["interval"] for group in groups} == {"1m"}  # a multiple of the 10 s in which Grafana counts


@CONFIGS
def test_the_data_source_that_is_provisioned_is_the_one_that_the_alerts_ask(config: AlertsConfig) -> None:
    content = yaml.safe_load(render(config)["grafana/provisioning/datasources/ess_monitor.yml"])
    sources = {source["type"]: source for source in content["datasources"]}
    assert sources["prometheus"]["uid"] == config.grafana_datasource_uid
    assert sources["prometheus"]["jsonData"]["alertmanagerUid"] == sources["alertmanager"]["uid"]
    scrape = yaml.safe_load(render(config)["prometheus/prometheus.example.yml"])["global"]["scrape_interval"]
    assert sources["prometheus"]["jsonData"]["timeInterval"] == scrape


def _services() -> dict[str, dict[str, Any]]:
    services: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    return services


def _mounts(service: str) -> dict[str, str]:
    """Path in the container -> what lies there: a path beside the compose file, a variable or a volume."""
    mounts = {}
    for volume in _services()[service]["volumes"]:
        source, _, rest = volume.rpartition(":/")
        mounts["/" + rest.removesuffix(":ro")] = source
    return mounts


@pytest.mark.parametrize("service", ["prometheus", "alertmanager", "grafana"])
def test_a_container_is_pinned_listens_on_loopback_and_mounts_what_is_there(service: str) -> None:
    content = _services()[service]
    assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", content["image"])
    assert content["network_mode"] == "host"
    addresses = [part.partition("=")[2] for part in content.get("command", []) if "listen-address" in part]
    addresses += [value for name, value in content.get("environment", {}).items() if name.endswith("HTTP_ADDR")]
    assert addresses
    assert all(address == "" or address.startswith("127.0.0.1") for address in addresses)
    beside = [source for source in _mounts(service).values() if source.startswith("..")]
    assert beside
    assert [source for source in beside if not (COMPOSE.parent / source).exists()] == []
    exported = {f"../{name}" for name in render(AlertsConfig())}
    assert all(any(name == source or name.startswith(f"{source}/") for name in exported) for source in beside)


def test_the_containers_find_each_other() -> None:
    sources = yaml.safe_load((ALERTS / "grafana/provisioning/datasources/ess_monitor.yml").read_text())["datasources"]
    addresses = {source["type"]: source["url"].removeprefix("http://") for source in sources}
    for service in ("prometheus", "alertmanager"):
        assert f"--web.listen-address={addresses[service]}" in _services()[service]["command"]
    config = yaml.safe_load((ALERTS / "prometheus/prometheus.example.yml").read_text())
    assert config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] == [addresses["alertmanager"]]
    (provider,) = yaml.safe_load((ALERTS / "grafana/provisioning/dashboards/ess_monitor.yml").read_text())["providers"]
    folder = provider["options"]["path"]
    assert _mounts("grafana")[folder] == "../grafana/dashboards"
    home = Path(_services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent == Path(folder)
    assert (ALERTS / "grafana/dashboards" / home.name).exists()
    assert not any("alerting" in path for path in _mounts("grafana")), "every alert would come twice"


@pytest.mark.servers
def test_the_configuration_in_the_container_is_one(tmp_path: Path) -> None:
    for inside, source in _mounts("prometheus").items():
        place = tmp_path / inside.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.startswith(".."):
            shutil.copy(COMPOSE.parent / source, place)
        else:
            place.mkdir()
    target = tmp_path / "etc/prometheus/targets/wla-7-0.json"
    target.write_text('[{"targets": ["127.0.0.1:9464"]}]')
    config = tmp_path / "etc/prometheus/prometheus.yml"
    command = ["promtool", "check", "config", str(config)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "rules found" in answer.stdout
    command = ["promtool", "check", "service-discovery", "--timeout=2s", str(config), "ess_monitor"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "wla-7" in answer.stdout, answer.stdout + answer.stderr


def test_the_readme_names_the_variable_and_the_ports_of_the_compose_file() -> None:
    readme = (COMPOSE.parent / "README.md").read_text(encoding="utf-8")
    text = COMPOSE.read_text(encoding="utf-8")
    (variable,) = re.findall(r"\$\{(\w+):\?", text)
    assert f"{variable}=" in readme
    ports = set(re.findall(r"http://127\.0\.0\.1:(\d+)", readme))
    assert ports == {"3000", "9090", "9093"}
    assert all(port in text for port in ports)
