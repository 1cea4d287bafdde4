"""Settings of the exporters, and the way from them to an exporter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

import ess_monitor.exporters as room
from ess_monitor import ConfigError, MonitorConfig
from ess_monitor.exporters import (
    EventLogConfig,
    ExporterConfig,
    LogConfig,
    PrometheusConfig,
    PushgatewayConfig,
    TensorBoardConfig,
    TerminalConfig,
    TextfileConfig,
    build_exporter,
)

KINDS: dict[str, type[BaseModel]] = {
    "event_log": EventLogConfig,
    "log": LogConfig,
    "prometheus": PrometheusConfig,
    "pushgateway": PushgatewayConfig,
    "tensorboard": TensorBoardConfig,
    "terminal": TerminalConfig,
    "textfile": TextfileConfig,
}
LIST: TypeAdapter[list[Any]] = TypeAdapter(list[ExporterConfig])


def test_the_kinds_are_all_there() -> None:
    union = get_args(get_args(ExporterConfig)[0])
    assert set(union) == set(KINDS.values())


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_name_stands_for_its_defaults_and_builds_the_exporter_of_that_name(kind: str) -> None:
    (config,) = LIST.validate_python([kind])
    assert config == KINDS[kind]()
    exporter = build_exporter(config)
    assert exporter.name == kind
    exporter.close("finished")


def test_names_settings_and_objects_mix_in_one_list() -> None:
    configs = LIST.validate_python(["prometheus", {"kind": "event_log", "path": "x"}, TerminalConfig(width=50)])
    assert configs == [PrometheusConfig(), EventLogConfig(path=Path("x")), TerminalConfig(width=50)]


def test_settings_survive_json() -> None:
    configs = LIST.validate_python(sorted(KINDS))
    assert LIST.validate_json(LIST.dump_json(configs)) == configs


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValidationError) as caught:
        LIST.validate_python(["promethus"])
    assert all(kind in str(caught.value) for kind in KINDS)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_unknown_setting_is_refused_and_settings_are_frozen(kind: str) -> None:
    with pytest.raises(ConfigError, match="unheard_of: unknown setting"):
        MonitorConfig(exporters=[{"kind": kind, "unheard_of": 1}])
    with pytest.raises(ValidationError, match="frozen"):
        KINDS[kind]().kind = "other"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_loopback_host_is_allowed(host: str) -> None:
    assert PrometheusConfig(host=host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.168.0.1", "example.org", "localhost.example.org"])
def test_a_host_that_others_can_reach_is_refused_unless_allowed(host: str) -> None:
    with pytest.raises(ConfigError, match=r"nobody would be asked.*allow_unauthenticated=True"):
        PrometheusConfig(host=host)
    assert PrometheusConfig(host=host, allow_unauthenticated=True).host == host


def test_a_key_without_a_certificate_is_refused() -> None:
    with pytest.raises(ConfigError, match="give both or neither"):
        PrometheusConfig(keyfile=Path("key.pem"))


def test_importing_the_room_imports_no_sink() -> None:
    code = (
        "import json, sys; import ess_monitor.records; before = set(sys.modules); import ess_monitor.exporters; "
        "print(json.dumps(sorted(name.split('.')[0] for name in set(sys.modules) - before)))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert {"prometheus_client", "tensorboard", "rich"}.isdisjoint(json.loads(output))


def test_the_exported_names_exist_and_are_sorted() -> None:
    assert room.__all__ == sorted(room.__all__)
    assert all(hasattr(room, name) for name in room.__all__)


@pytest.mark.parametrize("kind", ["prometheus", "pushgateway", "textfile"])
def test_every_setting_of_the_prometheus_exporters_is_documented(kind: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "prometheus.md").read_text(encoding="utf-8")
    assert [name for name in KINDS[kind].model_fields if f"`{name}" not in page and f" {name}: " not in page] == []
