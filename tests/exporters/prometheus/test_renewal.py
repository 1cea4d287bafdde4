"""Certificates and secrets whose files are renewed while a run goes on."""

from __future__ import annotations

import logging
import os
import shutil
import ssl
import urllib.error
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path

import pytest

from ess_monitor.exporters import PrometheusConfig, PrometheusExporter, PushgatewayConfig, PushgatewayExporter
from ess_monitor.exporters.prometheus.http.request import Request, Response, text_response
from ess_monitor.exporters.prometheus.http.server import Endpoint
from tests.exporters.conftest import Certificate
from tests.exporters.helpers import run_info, snapshot
from tests.exporters.prometheus.scraping import ask, basic


@pytest.fixture
def serve() -> Iterator[Callable[..., PrometheusExporter]]:
    """Start an exporter with these settings; it is stopped after the test."""
    started = []

    def start(**settings: object) -> PrometheusExporter:
        exporter = PrometheusExporter(PrometheusConfig(port=0, **settings))
        exporter.start(run_info(), lambda: snapshot())
        started.append(exporter)
        return exporter

    yield start
    for exporter in started:
        exporter.stop()


def overwrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def replace(path: Path, content: bytes) -> None:
    """As a careful tool does: the old file or the new one is there at any time."""
    new = path.with_name("new")
    new.write_bytes(content)
    os.replace(new, path)


def relink(path: Path, content: bytes) -> None:
    """As Kubernetes does: the file is a link into a folder which is exchanged."""
    folder = path.with_name(f"{path.name}.{len(list(path.parent.iterdir()))}")
    folder.mkdir()
    (folder / "content").write_bytes(content)
    path.unlink()
    path.symlink_to(folder / "content")


@pytest.mark.parametrize("write", [overwrite, replace, relink])
@pytest.mark.parametrize("username", [None, "prometheus"])
def test_a_renewed_secret_is_asked_for_at_the_next_scrape(
    write: Callable[[Path, bytes], None], username: str | None, tmp_path: Path, serve: Callable[..., PrometheusExporter]
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("first")

    def status(password: str) -> int:
        header = f"Bearer {password}" if username is None else basic(username, password)
        return ask(exporter.url, Authorization=header).status

    exporter = serve(auth={"secret_file": secret, "username": username})
    assert (status("first"), status("second")) == (200, 401)
    for old, new in (("first", "second"), ("second", "third!")):
        write(secret, new.encode())
        assert (status(new), status(old)) == (200, 401)


BROKEN: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "empty": lambda path: path.write_text(""),
    "binary": lambda path: path.write_bytes(b"\xff\xfe"),
    "large": lambda path: path.write_text("x" * 10_000),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_renewal_keeps_the_old_secret_and_is_logged_once(
    kind: str, tmp_path: Path, serve: Callable[..., PrometheusExporter], caplog: pytest.LogCaptureFixture
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret-old")
    exporter = serve(auth={"secret_file": secret})
    for _ in range(2):
        caplog.clear()
        BROKEN[kind](secret)
        for _ in range(3):
            assert ask(exporter.url, Authorization="Bearer s3cret-old").status == 200
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "The one from before is used on" in caplog.text
        assert "s3cret" not in caplog.text
        secret.write_text("s3cret-new")
        assert ask(exporter.url, Authorization="Bearer s3cret-old").status == 401
        assert ask(exporter.url, Authorization="Bearer s3cret-new").status == 200
        secret.write_text("s3cret-old")
        assert ask(exporter.url, Authorization="Bearer s3cret-old").status == 200


def _copy(certificate: Certificate, to: Certificate) -> None:
    shutil.copy(certificate.certfile, to.certfile)
    shutil.copy(certificate.keyfile, to.keyfile)


def _served_by(exporter: PrometheusExporter, certificate: Certificate) -> bool:
    """Whether the endpoint shows this certificate."""
    context = ssl.create_default_context(cafile=certificate.certfile)
    context.check_hostname = False
    try:
        return ask(exporter.url, context=context).status == 200
    except urllib.error.URLError:
        return False


def test_a_renewed_certificate_is_shown_to_the_next_connection(
    certificate: Certificate,
    stranger_certificate: Certificate,
    tmp_path: Path,
    serve: Callable[..., PrometheusExporter],
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = Certificate(tmp_path / "server.pem", tmp_path / "server.key")
    _copy(certificate, files)
    exporter = serve(**files._asdict())
    assert _served_by(exporter, certificate)
    shutil.copy(stranger_certificate.certfile, files.certfile)  # without its key
    assert _served_by(exporter, certificate)
    assert _served_by(exporter, certificate)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    _copy(stranger_certificate, files)
    assert _served_by(exporter, stranger_certificate)
    assert not _served_by(exporter, certificate)
    assert len(caplog.records) == 1


def test_a_renewed_authority_decides_on_the_next_client(
    certificate: Certificate,
    client_certificate: Certificate,
    stranger_certificate: Certificate,
    tmp_path: Path,
    serve: Callable[..., PrometheusExporter],
) -> None:
    authority = tmp_path / "authority.pem"
    shutil.copy(client_certificate.certfile, authority)
    exporter = serve(**certificate._asdict(), client_cafile=authority)

    def admits(client: Certificate) -> bool:
        context = ssl.create_default_context(cafile=certificate.certfile)
        context.check_hostname = False
        context.load_cert_chain(*client)
        try:
            return ask(exporter.url, context=context).status == 200
        except (urllib.error.URLError, OSError):
            return False

    assert (admits(client_certificate), admits(stranger_certificate)) == (True, False)
    shutil.copy(stranger_certificate.certfile, authority)
    assert (admits(client_certificate), admits(stranger_certificate)) == (False, True)


def test_the_push_at_the_end_has_the_secret_of_that_time(tmp_path: Path) -> None:
    seen: list[str] = []

    def answer(request: Request) -> Response:
        seen.append(request.headers["authorization"])
        return text_response(HTTPStatus.OK, "")

    secret = tmp_path / "secret"
    secret.write_text("first")
    gateway = Endpoint(answer, "127.0.0.1", 0)
    try:
        exporter = PushgatewayExporter(PushgatewayConfig(url=gateway.url, auth={"secret_file": secret}))
        exporter.start(run_info(), lambda: snapshot())
        secret.write_text("second")
        exporter.close("finished")
    finally:
        gateway.close()
    assert seen == ["Bearer first", "Bearer second"]
