"""Two runs on one machine that set no port."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ess_monitor import ExporterError, Monitor, MonitorConfig
from ess_monitor.exporters import PrometheusConfig, read_event_log
from ess_monitor.exporters.prometheus import exporter as module
from ess_monitor.featurizers import GLA
from tests.exporters.prometheus.scraping import ask


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Another process has the default port, which is not the real one here: that may be in use."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        monkeypatch.setattr(module, "DEFAULT_PORT", port)
        yield port


def run(folder: Path, **settings: object) -> Monitor:
    log = {"kind": "event_log", "path": folder / "events.jsonl"}
    return Monitor(GLA(8, 1), MonitorConfig(exporters=[log, "log", {"kind": "prometheus", **settings}]))


def test_the_second_run_takes_a_free_port_and_says_which(
    other: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ess_monitor")
    with run(tmp_path, run_id="mine") as monitor:
        (url,) = (exporter.url for exporter in monitor.exporters if exporter.name == "prometheus")  # type: ignore[attr-defined]
        assert f":{other}/" not in url
        assert b"ess_monitor_layers 1.0" in ask(url).body
        monitor.model(torch.ones(1, 4, 8))
    warning, *others = (record for record in caplog.records if url in record.getMessage())
    assert warning.levelno == logging.WARNING
    assert f"port {other} is in use" in warning.getMessage()
    assert [record.getMessage().split()[0] for record in others] == ["run_started"]
    (started,) = (event for event in read_event_log(tmp_path / "events.jsonl") if event.event == "run_started")
    assert started.data.addresses == {"prometheus": url}


def test_a_run_alone_has_the_default_port(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    monkeypatch.setattr(module, "DEFAULT_PORT", port)
    with run(tmp_path):
        (started,) = read_event_log(tmp_path / "events.jsonl")
        assert started.event == "run_started"
        assert started.data.addresses == {"prometheus": f"http://127.0.0.1:{port}/metrics"}


def test_a_port_that_was_asked_for_is_the_one_or_none(other: int, tmp_path: Path) -> None:
    with pytest.raises(ExporterError, match=rf"port {other} is in use.*port=0"):
        run(tmp_path, port=other).start()


def test_settings_that_went_through_a_checkpoint_still_ask_for_none() -> None:
    config = MonitorConfig(exporters=["prometheus"])
    again = MonitorConfig(**config.model_dump(mode="json"))
    assert again.exporters == (PrometheusConfig(),)
    assert PrometheusConfig(port=9464) != PrometheusConfig()
