from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ess_monitor import ConfigError, MonitorConfig


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.upper().startswith("ESS_MONITOR_"):
            monkeypatch.delenv(name)


def write(folder: Path, text: str) -> Path:
    path = folder / "ess.yaml"
    path.write_text(text)
    return path


def test_the_defaults_are_a_configuration() -> None:
    assert MonitorConfig.load() == MonitorConfig()
    assert MonitorConfig().autopilot.mode == "advise"


def test_yaml_environment_and_arguments_lie_on_top_of_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "every_n_steps: 10\ntolerance: 0.5\ncapture: {samples: 2, heads: 1}\npositions: 5\n")
    monkeypatch.setenv("ESS_MONITOR_TOLERANCE", "0.25")
    monkeypatch.setenv("ESS_MONITOR_CAPTURE__SAMPLES", "7")
    config = MonitorConfig.load(path, positions=9)
    assert (config.every_n_steps, config.tolerance, config.positions) == (10, 0.25, 9)
    assert (config.capture.samples, config.capture.heads) == (7, 1)


def test_the_environment_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESS_MONITOR_TOLERANCE", "0.25")
    assert MonitorConfig.load(environment=False).tolerance == 1e-3


def test_lists_and_short_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESS_MONITOR_EXPORTERS", '["prometheus", {"kind": "event_log", "path": "x.jsonl"}]')
    monkeypatch.setenv("ESS_MONITOR_AUTOPILOT__MODE", "auto")
    config = MonitorConfig.load(layers=["blocks.*"])
    assert [e.kind for e in config.exporters] == ["prometheus", "event_log"]
    assert config.autopilot.mode == "auto"
    assert config.layers.include == ("blocks.*",)
    assert MonitorConfig(autopilot="off").autopilot.mode == "off"
    assert MonitorConfig(layers="blocks.1").layers.include == ("blocks.1",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, r"every_n_steps: .*greater than 0.*got 0"),
        ({"overhead_budget_ratio": 2.0}, r"overhead_budget_ratio: .*less than or equal to 1"),
        ({"tolerance": -1.0}, r"tolerance: .*greater than or equal to 0"),
        ({"positions": "middle"}, r"positions"),
        ({"evry_n_steps": 3}, r"evry_n_steps: unknown setting"),
        ({"capture": {"sample": 3}}, r"capture\.sample: unknown setting"),
        ({"autopilot": "on"}, r"autopilot\.mode: .*'off', 'advise' or 'auto'"),
        ({"exporters": ["graphite"]}, r"exporters.*graphite"),
        ({"diagnosis": {"metric": "accuracy"}}, r"metric_solved"),
        ({"autopilot": {"mode": "auto", "lag_steps": 500}}, r"lag_steps=500 must be below every_n_steps=100"),
    ],
)
def test_a_wrong_setting_is_named_with_value_and_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MonitorConfig.load(**settings)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ESS_MONITOR_EVERY_N_STEP", "3", r"ESS_MONITOR_EVERY_N_STEP is not a setting"),
        ("ESS_MONITOR_PORT", "9464", r"ESS_MONITOR_PORT is not a setting"),
        ("ESS_MONITOR_CAPTURE__SAMPLE", "3", r"capture\.sample: unknown setting"),
        ("ESS_MONITOR_EXPORTERS", "[prometheus", r"environment"),
    ],
)
def test_a_wrong_variable_is_an_error_and_not_ignored(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        MonitorConfig.load()


def kubernetes(service: str, port: int, protocol: str, port_name: str) -> dict[str, str]:
    """Return the variables that every pod gets of a Service in its namespace."""
    prefix, address = service.upper().replace("-", "_"), "10.96.0.7"
    of_port = f"{prefix}_PORT_{port}_{protocol.upper()}"
    return {
        f"{prefix}_SERVICE_HOST": address,
        f"{prefix}_SERVICE_PORT": str(port),
        f"{prefix}_SERVICE_PORT_{port_name.upper()}": str(port),
        f"{prefix}_PORT": f"{protocol}://{address}:{port}",
        of_port: f"{protocol}://{address}:{port}",
        f"{of_port}_PROTO": protocol,
        f"{of_port}_PORT": str(port),
        f"{of_port}_ADDR": address,
    }


@pytest.mark.parametrize(
    "variables",
    [
        kubernetes("ess-monitor", 9464, "tcp", "metrics"),
        kubernetes("ess-monitor-gateway", 53, "udp", "dns"),
        {"ESS_MONITOR_TARGETS": "/var/tmp/targets"},
    ],
    ids=["service", "another service", "compose file"],
)
def test_variables_that_others_set_are_none_of_ours(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**variables, "ESS_MONITOR_EVERY_N_STEPS": "7"}.items():
        monkeypatch.setenv(name, value)
    assert MonitorConfig.load() == MonitorConfig(every_n_steps=7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", r"holds a list; it must be a mapping"),
        ("a: [1\n", r"is not YAML"),
        ("!!python/object/apply:os.system ['true']\n", r"is not YAML"),
        ("x" * 2_000_000, r"larger than"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        MonitorConfig.load(write(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere\.yaml"):
        MonitorConfig.load(tmp_path / "nowhere.yaml")


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert MonitorConfig.load(write(tmp_path, "")) == MonitorConfig()


def test_a_configuration_survives_a_round_trip_through_json() -> None:
    config = MonitorConfig.load(exporters=["prometheus", "terminal"], autopilot="auto", layers=["a.*"])
    assert MonitorConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    "exporter",
    [
        {"kind": "prometheus", "auth": "hunter2"},
        {"kind": "prometheus", "auth": {"password": "hunter2"}},
        {"kind": "pushgateway", "url": "ftp://user:hunter2@gateway"},
        {"kind": "nothing", "auth": "hunter2"},
    ],
)
def test_no_error_repeats_what_may_be_a_secret(exporter: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as plain:
        MonitorConfig(exporters=[exporter])
    with pytest.raises(ConfigError, match="exporters") as loaded:
        MonitorConfig.load(exporters=[exporter])
    assert "hunter2" not in f"{plain.value} {loaded.value}"
