"""The push at the end of a run: against a stand-in that misbehaves, and against a real Pushgateway."""

from __future__ import annotations

import base64
import logging
import os
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ess_monitor.errors import ConfigError, ExporterError
from ess_monitor.exporters import ExporterHub, PushgatewayConfig, PushgatewayExporter, RunIdentity
from ess_monitor.exporters.prometheus.http.request import Request, text_response
from ess_monitor.exporters.prometheus.http.server import Endpoint, Handler
from tests.exporters.helpers import free_port, measurement, run_info, snapshot

PATIENCE_SECONDS = 30.0


@contextmanager
def _gateway(answer: Handler) -> Iterator[str]:
    endpoint = Endpoint(answer, "127.0.0.1", 0)
    try:
        yield endpoint.url
    finally:
        endpoint.close()


def _run(hub: ExporterHub) -> None:
    hub.start(run_info(), lambda: snapshot())
    hub.export(measurement())
    hub.close("finished", timeout_seconds=PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def pushgateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real one."""
    binary = shutil.which("prometheus-pushgateway") or shutil.which("pushgateway")
    if binary is None:
        reason = "prometheus-pushgateway is not on PATH; install the package of that name (Debian, Ubuntu)"
        promised = os.environ.get("CI", "").lower() not in ("", "0", "false")
        pytest.fail(reason, pytrace=False) if promised else pytest.skip(reason)
    url = f"http://127.0.0.1:{free_port()}"
    log = (tmp_path_factory.mktemp("pushgateway") / "log").open("wb")
    # Debian's build keeps what was pushed in a file of the system unless told otherwise.
    arguments = [binary, f"--web.listen-address={url[7:]}", "--persistence.file="]
    process = subprocess.Popen(arguments, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not _ready(url):
            assert process.poll() is None, "the Pushgateway ended"
            assert time.monotonic() < deadline, "the Pushgateway does not answer"
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)
        log.close()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=PATIENCE_SECONDS) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _pushed(url: str) -> dict[tuple[str, str, str], dict[str, float]]:
    """(job, run_id, rank) -> status -> value of run_status."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=PATIENCE_SECONDS) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for sample in (sample for family in families for sample in family.samples):
        if sample.name == "ess_monitor_run_status":
            labels = sample.labels
            group = found.setdefault((labels["job"], labels["run_id"], labels["rank"]), {})
            group[labels["status"]] = sample.value
    return found


@pytest.mark.servers
def test_a_real_pushgateway_keeps_one_record_for_every_run_and_rank(pushgateway: str) -> None:
    config = PushgatewayConfig(url=pushgateway, ranks="all")
    for run_id, rank, status in (("a", 0, "failed"), ("a", 0, "finished"), ("a", 1, "finished"), ("b", 0, "failed")):
        exporter = PushgatewayExporter(config, RunIdentity(run_id, rank, rank))
        exporter.start(run_info(), lambda: snapshot())
        before = _pushed(pushgateway)
        exporter.export(measurement())
        assert _pushed(pushgateway) == before, "nothing is pushed while the run goes on"
        exporter.close(status)  # type: ignore[arg-type]
    statuses = {
        group[1:]: next(name for name, value in values.items() if value)
        for group, values in _pushed(pushgateway).items()
    }
    assert statuses == {("a", "0"): "finished", ("a", "1"): "finished", ("b", "0"): "failed"}
    assert {group[0] for group in _pushed(pushgateway)} == {"ess-monitor-final"}


def test_a_push_carries_credentials_and_the_whole_grouping_key(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("correct-horse")
    asked: list[Request] = []

    def answer(request: Request):  # type: ignore[no-untyped-def]
        asked.append(request)
        return text_response(HTTPStatus.OK, "ok")

    with _gateway(answer) as url:
        config = PushgatewayConfig(
            url=f"{url}/", run_id="wla-7", auth={"username": "job", "secret_file": tmp_path / "secret"}
        )
        hub = ExporterHub([PushgatewayExporter(config)])
        _run(hub)
    assert hub.errors == {"pushgateway": 0}
    assert [(request.method, request.path) for request in asked] == [
        ("GET", "/-/ready"),
        ("PUT", "/metrics/job/ess-monitor-final/rank/0/run_id/wla-7"),
    ]
    expected = "Basic " + base64.b64encode(b"job:correct-horse").decode()
    assert {request.headers["authorization"] for request in asked} == {expected}


def test_a_gateway_that_refuses_is_an_error_that_is_counted_and_logged_with_its_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def answer(request: Request):  # type: ignore[no-untyped-def]
        if request.method == "PUT":
            return text_response(HTTPStatus.BAD_REQUEST, "pushed metrics are invalid")
        return text_response(HTTPStatus.OK, "ok")

    with _gateway(answer) as url, caplog.at_level(logging.WARNING):
        hub = ExporterHub([PushgatewayExporter(PushgatewayConfig(url=url))])
        _run(hub)
    assert hub.errors == {"pushgateway": 1}
    assert "answered 400: pushed metrics are invalid" in caplog.text


def test_a_gateway_that_is_gone_or_hangs_at_the_end_is_counted_and_never_raised() -> None:
    release = threading.Event()

    def answer(request: Request):  # type: ignore[no-untyped-def]
        if request.method == "PUT":
            release.wait(PATIENCE_SECONDS)
        return text_response(HTTPStatus.OK, "ok")

    with _gateway(answer) as url:
        hanging = ExporterHub([PushgatewayExporter(PushgatewayConfig(url=url, timeout_seconds=0.2))])
        _run(hanging)
        gone = ExporterHub([PushgatewayExporter(PushgatewayConfig(url=url))])
        gone.start(run_info(), lambda: snapshot())
        release.set()
    gone.close("finished", timeout_seconds=PATIENCE_SECONDS)
    assert (hanging.errors, gone.errors) == ({"pushgateway": 1}, {"pushgateway": 1})


def test_a_gateway_that_is_not_there_is_an_error_at_the_start() -> None:
    exporter = PushgatewayExporter(PushgatewayConfig(url=f"http://127.0.0.1:{free_port()}"))
    with pytest.raises(ExporterError, match=r"does not answer .* Set the address of a Pushgateway that runs"):
        exporter.start(run_info(), lambda: snapshot())
    exporter.close("failed")


def test_credentials_that_are_refused_are_an_error_at_the_start_and_a_hidden_health_page_is_none() -> None:
    for status, fails in ((HTTPStatus.UNAUTHORIZED, True), (HTTPStatus.NOT_FOUND, False)):
        with _gateway(lambda request, status=status: text_response(status, "no")) as url:
            exporter = PushgatewayExporter(PushgatewayConfig(url=url))
            if fails:
                with pytest.raises(ExporterError, match="Set auth"):
                    exporter.start(run_info(), lambda: snapshot())
            else:
                exporter.start(run_info(), lambda: snapshot())


def test_a_rank_that_is_left_out_pushes_nothing() -> None:
    exporter = PushgatewayExporter(PushgatewayConfig(url="http://127.0.0.1:1"), RunIdentity("a", rank=1, local_rank=1))
    exporter.start(run_info(), lambda: snapshot())
    exporter.close("finished")


@pytest.mark.parametrize("url", ["gateway:9091", "ftp://gateway", "http://", "http://user@gateway:9091", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="url: must"):
        PushgatewayConfig(url=url)
