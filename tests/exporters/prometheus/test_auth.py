"""Who may read the metrics: credentials from files and variables, and secrets that show up nowhere."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ess_monitor.errors import ConfigError, ExporterError
from ess_monitor.exporters import AuthConfig, PrometheusConfig, PrometheusExporter, PushgatewayConfig
from ess_monitor.exporters.prometheus.auth import Authenticator, load_credentials
from ess_monitor.exporters.prometheus.http.request import parse_request
from tests.exporters.conftest import Certificate
from tests.exporters.helpers import run_info, snapshot
from tests.exporters.prometheus.scraping import ask, basic

SECRET = "correct-horse-battery"


@contextmanager
def _serving(**settings: Any) -> Iterator[PrometheusExporter]:
    exporter = PrometheusExporter(PrometheusConfig(port=0, **settings))
    exporter.start(run_info(), lambda: snapshot())
    try:
        yield exporter
    finally:
        exporter.close("finished")


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(f"{SECRET}\n")
    return path


@pytest.fixture(params=["file", "variable"])
def source(request: pytest.FixtureRequest, secret_file: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    if request.param == "file":
        return {"secret_file": secret_file}
    monkeypatch.setenv("METRICS_SECRET", SECRET)
    return {"secret_env": "METRICS_SECRET"}


def test_basic_auth_lets_the_right_password_in_and_nobody_else(source: dict[str, Any]) -> None:
    with _serving(auth={"username": "prometheus", **source}) as exporter:
        assert ask(exporter.url, Authorization=basic("prometheus", SECRET)).status == 200
        refused = [
            basic("prometheus", SECRET + "x"),
            basic("prometheus", SECRET[:-1]),
            basic("prometheu", SECRET),
            basic("", ""),
            f"Bearer {SECRET}",
            basic("prometheus", SECRET).replace("Basic", "Bearer"),
            "Basic",
            "Basic ???",
            "",
            "\xff" * 50,
        ]
        answers = [ask(exporter.url), *(ask(exporter.url, Authorization=value) for value in refused)]
        assert {answer.status for answer in answers} == {401}
        assert {answer.headers["WWW-Authenticate"] for answer in answers} == {
            'Basic realm="ess_monitor", charset="UTF-8"'
        }
        assert not any(b"ess_monitor_" in answer.body for answer in answers)


def test_a_bearer_token_lets_in_and_the_scheme_may_be_written_in_any_case(source: dict[str, Any]) -> None:
    with _serving(auth=source) as exporter:
        assert ask(exporter.url, Authorization=f"Bearer {SECRET}").status == 200
        assert ask(exporter.url, Authorization=f"bearer  {SECRET}").status == 200
        answer = ask(exporter.url, Authorization=basic("prometheus", SECRET))
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, 'Bearer realm="ess_monitor"')
        assert ask(exporter.url, "HEAD").status == 401


def test_health_needs_no_credentials_and_tells_nothing_else(secret_file: Path) -> None:
    with _serving(auth={"secret_file": secret_file}) as exporter:
        assert exporter.url is not None
        base = exporter.url.removesuffix("/metrics")
        assert ask(f"{base}/-/healthy")[::2] == (200, b"ok\n")
        assert ask(f"{base}/other").status == 404
        assert ask(exporter.url, "POST").status == 405


def test_a_user_name_and_a_password_may_have_any_letters(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("pässwörd: 注意", encoding="utf-8")
    with _serving(auth={"username": "prométhée", "secret_file": path}) as exporter:
        assert ask(exporter.url, Authorization=basic("prométhée", "pässwörd: 注意")).status == 200


def test_a_secret_shows_in_no_repr_dump_log_or_error(secret_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = AuthConfig(username="prometheus", secret_file=secret_file)
    credentials = load_credentials(config)
    gate = Authenticator(credentials)
    header = credentials.header
    request = parse_request(f"GET /metrics HTTP/1.1\r\nAuthorization: {header}\r\n\r\n".encode())
    with caplog.at_level(logging.DEBUG), _serving(auth=config) as exporter:
        ask(exporter.url, Authorization=header)
        ask(exporter.url, Authorization=header + "x")
        shown = [repr(exporter.config), repr(vars(exporter)), exporter.config.model_dump_json()]
    shown += [repr(config), repr(credentials), repr(vars(gate)), repr(request), caplog.text]
    assert gate.admits(request.headers)
    assert not [text for text in shown if SECRET in text or header.split()[1] in text]


@pytest.mark.parametrize(
    "settings",
    [
        {"auth": {"password": SECRET}},
        {"auth": {"token": SECRET}},
        {"auth": SECRET},
        {"password": SECRET},
        {"auth": {"username": f"prometheus:{SECRET}", "secret_env": "X"}},
    ],
)
def test_a_secret_as_a_setting_is_refused_without_repeating_it(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        PrometheusConfig(**settings)
    assert SECRET not in str(caught.value)


def test_a_secret_in_the_address_of_a_pushgateway_is_refused_without_repeating_it() -> None:
    with pytest.raises(ConfigError, match="set auth") as caught:
        PushgatewayConfig(url=f"http://prometheus:{SECRET}@gateway:9091")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("settings", [{}, {"secret_file": "a", "secret_env": "B"}])
def test_one_source_of_the_secret_must_be_given(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"one of secret_file .* and secret_env"):
        AuthConfig(**settings)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "cannot be read"),
        (lambda path: path.write_text(" \n"), "no secret in"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "not UTF-8"),
        (lambda path: path.write_text("x" * 10_000), "larger than 4096 bytes"),
        (lambda path: path.write_text("two words"), "printable ASCII"),
    ],
    ids=["missing", "empty", "binary", "large", "blank inside"],
)
def test_a_secret_file_that_cannot_be_used_is_an_error_at_the_start(
    write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "secret")
    with pytest.raises(ExporterError, match=message), _serving(auth={"secret_file": tmp_path / "secret"}):
        pass


def test_a_variable_that_is_not_set_is_an_error_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METRICS_SECRET", raising=False)
    with (
        pytest.raises(ExporterError, match="secret_env='METRICS_SECRET'"),
        _serving(auth={"secret_env": "METRICS_SECRET"}),
    ):
        pass


def test_an_address_that_others_reach_opens_with_auth_with_client_certificates_or_when_told_to(
    secret_file: Path, certificate: Certificate
) -> None:
    for ways_out in ({"auth": {"secret_file": secret_file}}, {"allow_unauthenticated": True}):
        with _serving(host="0.0.0.0", **ways_out) as exporter:
            assert exporter.url is not None
            assert exporter.url.startswith("http://0.0.0.0:")
            answer = ask(exporter.url.replace("0.0.0.0", "127.0.0.1"), Authorization=f"Bearer {SECRET}")
            assert b"ess_monitor_layers 2.0" in answer.body
    PrometheusConfig(host="0.0.0.0", certfile=certificate.certfile, client_cafile=certificate.certfile)


def test_an_open_address_without_auth_is_a_config_error_that_names_the_ways_out() -> None:
    from ess_monitor import MonitorConfig

    with pytest.raises(ConfigError) as caught:
        MonitorConfig.load(environment=False, exporters=[{"kind": "prometheus", "host": "0.0.0.0"}])
    assert all(
        word in str(caught.value) for word in ("auth", "client_cafile", "127.0.0.1", "allow_unauthenticated=True")
    )


def test_with_mutual_tls_only_a_client_with_a_known_certificate_connects(
    certificate: Certificate,
    client_certificate: Certificate,
    stranger_certificate: Certificate,
) -> None:
    def context(shown: Certificate | None) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=certificate.certfile)
        if shown is not None:
            made.load_cert_chain(*shown)
        return made

    settings = {**certificate._asdict(), "client_cafile": client_certificate.certfile}
    with _serving(**settings) as exporter:
        assert ask(exporter.url, context=context(client_certificate)).status == 200
        for shown in (None, stranger_certificate):
            with pytest.raises(OSError, match=r"(?i)alert|reset|closed|EOF|URLError"):
                ask(exporter.url, context=context(shown))
        assert ask(exporter.url, context=context(client_certificate)).status == 200


def test_a_client_authority_that_cannot_be_read_is_an_error_at_the_start(
    certificate: Certificate, tmp_path: Path
) -> None:
    settings = {**certificate._asdict(), "client_cafile": tmp_path / "missing.pem"}
    with pytest.raises(ExporterError, match=r"client_cafile=.*missing\.pem.*Give a PEM file"), _serving(**settings):
        pass
