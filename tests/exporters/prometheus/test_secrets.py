"""A whole run with a secret in every place that takes one: it is sent where it belongs, and shows nowhere else."""

from __future__ import annotations

import base64
import copy
import json
import logging
import pickle
import traceback
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import torch

from ess_monitor import ConfigError, EssMonitorError, Monitor, MonitorConfig, validation
from ess_monitor.errors import ExporterError
from ess_monitor.exporters import ExporterHub, PushgatewayConfig, PushgatewayExporter
from ess_monitor.exporters.prometheus.http.request import Request
from ess_monitor.featurizers import GLA
from ess_monitor.integrations.accelerate import ESSMonitorCallback
from ess_monitor.integrations.json_state import to_json
from tests.exporters.helpers import run_info, snapshot
from tests.exporters.prometheus.scraping import ask
from tests.exporters.prometheus.test_pushgateway import _gateway, text_response

SECRET = "correct-horse-battery"
ENCODED = base64.b64encode(f"job:{SECRET}".encode()).decode()
ADDRESS = f"http://prometheus:{SECRET}@127.0.0.1:9091"


def holds_the_secret(text: str) -> bool:
    return SECRET in text or ENCODED in text


def sinks(folder: Path, gateway: str) -> list[dict[str, Any]]:
    return [
        {"kind": "prometheus", "port": 0, "auth": {"secret_env": "READERS_TOKEN"}},
        {"kind": "pushgateway", "url": gateway, "auth": {"username": "job", "secret_file": folder / "secret"}},
        {"kind": "event_log", "path": folder / "events.jsonl"},
        {"kind": "textfile", "path": folder / "metrics.prom"},
        {"kind": "tensorboard", "log_dir": folder / "boards", "heatmap_columns": 0},
        {"kind": "terminal"},
        {"kind": "log"},
    ]


def test_a_run_sends_its_secrets_and_shows_them_nowhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "secret").write_text(SECRET)
    monkeypatch.setenv("READERS_TOKEN", SECRET)
    sent: list[str] = []

    def answer(request: Request) -> Any:
        sent.append(request.headers.get("authorization", ""))
        return text_response(HTTPStatus.OK, "ok")

    with caplog.at_level(logging.DEBUG), _gateway(answer) as gateway:
        config = MonitorConfig.load(environment=False, every_n_steps=1, exporters=sinks(tmp_path, gateway))
        monitor = Monitor(GLA(8, 2), config)
        with monitor:
            for _ in range(3):
                monitor.model(torch.randn(2, 8, 8)).sum().backward()
                monitor.step(metrics={"loss": 1.0})
            monitor.flush()
            [url] = [exporter.url for exporter in monitor.exporters if exporter.name == "prometheus"]  # type: ignore[attr-defined]
            page = ask(url, Authorization=f"Bearer {SECRET}")
            assert page.status == 200
    assert f"Basic {ENCODED}" in sent
    shown = {
        "log": caplog.text,
        "terminal": "".join(capfd.readouterr()),
        "page": page.body.decode(),
        "repr": f"{config!r} {monitor!r} {vars(monitor)!r} {[vars(each) for each in monitor.exporters]!r}",
        "dump": config.model_dump_json(),
        "state": json.dumps(to_json(monitor.state_dict()), default=str),
        "snapshot": monitor.snapshot().model_dump_json(),
    }
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "secret"]
    assert len(written) >= 3
    shown |= {path.name: path.read_bytes().decode("latin-1") for path in written}
    assert [place for place, text in shown.items() if holds_the_secret(text)] == []


def test_copies_and_pickles_of_a_callback_carry_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text(SECRET)
    monkeypatch.setenv("READERS_TOKEN", SECRET)
    callback = ESSMonitorCallback(exporters=sinks(tmp_path, "http://127.0.0.1:9091"))
    assert SECRET.encode() not in pickle.dumps(copy.deepcopy(callback))


def _in_the_environment(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ESS_MONITOR_EXPORTERS", value)
    MonitorConfig.load()


def _in_a_file(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    path = Path("settings.yaml")
    path.write_text(f"exporters: {value}\n")
    MonitorConfig.load(path, environment=False)


def _in_a_callback(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    ESSMonitorCallback(exporters=json.loads(value))


def _in_the_monitor(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    Monitor(GLA(8, 2), exporters=json.loads(value))


def _as_the_configuration(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    Monitor(GLA(8, 2), {"exporters": json.loads(value)})  # type: ignore[arg-type]


def _as_an_exporter(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    PushgatewayExporter(json.loads(value)[0])


def _as_the_address_of_an_exporter(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    PushgatewayExporter(ADDRESS)  # type: ignore[arg-type]


def _in_a_hub(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    ExporterHub(json.loads(value))


@pytest.mark.parametrize(
    "give",
    [
        _in_the_environment,
        _in_a_file,
        _in_a_callback,
        _in_the_monitor,
        _as_the_configuration,
        _as_an_exporter,
        _as_the_address_of_an_exporter,
        _in_a_hub,
    ],
)
@pytest.mark.parametrize(
    "exporter",
    [
        {"kind": "pushgateway", "url": ADDRESS},
        {"kind": "pushgateway", "auth": {"username": "job", "password": SECRET}},
        {"kind": "prometheus", "auth": SECRET},
    ],
    ids=["address", "password", "token"],
)
def test_a_secret_in_the_wrong_place_is_refused_and_not_repeated(
    give: Callable[[pytest.MonkeyPatch, str], None],
    exporter: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EssMonitorError) as refused:
        give(monkeypatch, json.dumps([exporter]))
    assert not holds_the_secret("".join(traceback.format_exception(None, refused.value, None)))  # and its causes


@pytest.mark.parametrize("value", [f'[{{"kind": "prometheus", "auth": "{SECRET}"', f"auth={SECRET}"])
def test_a_variable_that_is_no_json_is_not_repeated(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESS_MONITOR_EXPORTERS", value)
    with pytest.raises(ConfigError, match="environment") as refused:
        MonitorConfig.load()
    assert not holds_the_secret("".join(traceback.format_exception(refused.value)))


def test_a_gateway_that_answers_with_the_request_is_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)

    def answer(request: Request) -> Any:
        if request.method == "PUT":
            return text_response(HTTPStatus.BAD_REQUEST, f"what? {dict(request.headers)}")
        return text_response(HTTPStatus.OK, "ok")

    with _gateway(answer) as url:
        for auth in ({"username": "job"}, {}):
            config = PushgatewayConfig(url=url, auth={**auth, "secret_file": tmp_path / "secret"})  # type: ignore[arg-type]
            exporter = PushgatewayExporter(config)
            exporter.start(run_info(), lambda: snapshot())
            with pytest.raises(ExporterError, match="what") as refused:
                exporter.close("finished")
            assert not holds_the_secret(str(refused.value))


def test_an_error_tells_the_type_of_settings_and_masks_an_address() -> None:
    assert validation.shown({"url": ADDRESS}) == "a dict"
    assert validation.shown([{"url": ADDRESS}]) == "a list"
    assert validation.shown(ADDRESS) == "'http://...@127.0.0.1:9091'"
