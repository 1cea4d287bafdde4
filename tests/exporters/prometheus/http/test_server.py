"""The endpoint against peers that are silent, slow, broken, too many, or forked."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from ess_monitor.exporters import PrometheusConfig, PrometheusExporter
from ess_monitor.exporters.prometheus.http.request import (
    MAX_REQUEST_BYTES,
    BadRequest,
    Request,
    Response,
    parse_request,
    text_response,
)
from ess_monitor.exporters.prometheus.http.server import Endpoint, Handler
from tests.exporters.helpers import run_info, snapshot, threads_of_ours

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
PATIENCE_SECONDS = 30.0
"""How long a test waits for what must come at once; a failure, never a measurement."""


@contextlib.contextmanager
def _serving(handler: Handler | None = None, tls: ssl.SSLContext | None = None, **settings: Any) -> Iterator[Endpoint]:
    respond = handler or (lambda request: text_response(HTTPStatus.OK, "hello"))
    endpoint = Endpoint(respond, "127.0.0.1", 0, None if tls is None else lambda: tls, **settings)
    try:
        yield endpoint
    finally:
        endpoint.close()


def _connect(endpoint: Endpoint) -> socket.socket:
    return socket.create_connection((endpoint.host, endpoint.port), timeout=PATIENCE_SECONDS)


def _read_all(sock: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(65536):
            received += chunk
    return received


def _ask(endpoint: Endpoint, request: bytes = GET, context: ssl.SSLContext | None = None) -> bytes:
    with _connect(endpoint) as sock:
        if context is None:
            sock.sendall(request)
            return _read_all(sock)
        with context.wrap_socket(sock) as tls:
            tls.sendall(request)
            return _read_all(tls)


@contextlib.contextmanager
def _silent(endpoint: Endpoint, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_connect(endpoint)) for _ in range(count)]


def test_a_request_is_answered_and_the_connection_ends() -> None:
    with _serving() as endpoint:
        head, _, body = _ask(endpoint).partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"HTTP/1.1 200 OK"
    assert b"Content-Length: 6" in head
    assert b"Connection: close" in head
    assert body == b"hello\n"


def test_a_request_may_come_in_pieces() -> None:
    with _serving() as endpoint, _connect(endpoint) as sock:
        for byte in GET:
            sock.sendall(bytes([byte]))
        assert _read_all(sock).endswith(b"hello\n")


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_two_hundred_silent_peers_do_not_hold_up_a_scrape(tls: bool, request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue("tls_server_context") if tls else None
    client = request.getfixturevalue("client_context") if tls else None
    # Nothing times out within the test: the answer must not depend on the silent ones being given up.
    with _serving(tls=server, max_connections=16, timeout_seconds=600.0) as endpoint, _silent(endpoint, 200):
        for _ in range(3):
            assert _ask(endpoint, context=client).endswith(b"hello\n")
        scrapes = [thread for thread in threads_of_ours() if thread.name == "ess-monitor-scrape"]
        # Those that were pushed out may still be on their way out.
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(scrapes) > 16 and time.monotonic() < deadline:
            time.sleep(0.01)
            scrapes = [thread for thread in scrapes if thread.is_alive()]
        assert len(scrapes) <= 16


def test_the_oldest_silent_peer_makes_room_and_one_that_asked_is_kept() -> None:
    asked, answer = threading.Event(), threading.Event()

    def wait(request: Request) -> Response:
        asked.set()
        answer.wait(PATIENCE_SECONDS)
        return text_response(HTTPStatus.OK, "patience")

    with _serving(wait, max_connections=3, timeout_seconds=600.0) as endpoint, _connect(endpoint) as first:
        first.sendall(GET)
        assert asked.wait(PATIENCE_SECONDS)
        with _silent(endpoint, 3) as silent:
            assert silent[0].recv(1) == b"", "the oldest silent one was cut"
            answer.set()
            assert _read_all(first).endswith(b"patience\n"), "the older one that had asked was not"


def test_a_silent_peer_is_told_and_let_go() -> None:
    with _serving(timeout_seconds=0.05) as endpoint, _connect(endpoint) as sock:
        assert _read_all(sock).startswith(b"HTTP/1.1 408 ")


def test_a_peer_that_drips_bytes_is_let_go_too() -> None:
    with _serving(timeout_seconds=0.3) as endpoint, _connect(endpoint) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n")
        sock.settimeout(0.02)
        received = b""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not received and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                sock.sendall(b"x")
                received = sock.recv(100)
        assert received.startswith(b"HTTP/1.1 408 ")


def test_a_silent_tls_peer_is_let_go(tls_server_context: ssl.SSLContext) -> None:
    with _serving(tls=tls_server_context, timeout_seconds=0.05) as endpoint, _connect(endpoint) as sock:
        assert _read_all(sock) == b""


@pytest.mark.parametrize(
    "garbage", [GET, b"\x16\x03\x01\x00\x05hello", os.urandom(300)], ids=["http", "hello", "noise"]
)
def test_garbage_in_place_of_a_handshake_ends_its_own_connection_only(
    garbage: bytes, tls_server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    with _serving(tls=tls_server_context, timeout_seconds=1.0) as endpoint:
        _ask(endpoint, garbage)
        assert _ask(endpoint, context=client_context).endswith(b"hello\n")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 400),
        (b"\x00\xff\xfe\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 400),
        (b"GET /" + b"a" * MAX_REQUEST_BYTES + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nx: " + b"a" * 4 * MAX_REQUEST_BYTES, 431),
        (b"GET / HTTP/1.0\n\n", 200),
    ],
    ids=["words", "no version", "http 2", "binary", "empty", "headers", "long line", "endless", "bare newlines"],
)
def test_a_malformed_request_gets_its_error(request_bytes: bytes, status: int) -> None:
    with _serving() as endpoint:
        assert _ask(endpoint, request_bytes).startswith(f"HTTP/1.1 {status} ".encode())
        assert _ask(endpoint).endswith(b"hello\n")


def test_a_peer_that_leaves_early_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with _serving() as endpoint:
        for sent in (b"", b"GET", GET):
            with _connect(endpoint) as sock:
                sock.sendall(sent)
        assert _ask(endpoint).endswith(b"hello\n")
    assert caplog.records == []


def test_a_handler_that_fails_gives_a_500_without_details() -> None:
    def fail(request: Request) -> Response:
        raise RuntimeError("secret")

    with _serving(fail) as endpoint:
        answer = _ask(endpoint)
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"secret" not in answer


def test_a_handler_that_hangs_does_not_collect_threads_without_end() -> None:
    release = threading.Event()

    def hang(request: Request) -> Response:
        release.wait(PATIENCE_SECONDS)
        return text_response(HTTPStatus.OK, "late")

    with _serving(hang, timeout_seconds=0.2) as endpoint, contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(_connect(endpoint)) for _ in range(6)]
        for sock in waiting:
            sock.sendall(GET)
        for _ in range(2):
            readable, _, _ = select.select(waiting, [], [], PATIENCE_SECONDS)
            assert _read_all(readable[0]).startswith(b"HTTP/1.1 503 ")
            waiting.remove(readable[0])
        release.set()
        assert [_read_all(sock)[9:12] for sock in waiting] == [b"200"] * 4


def test_closing_cuts_open_connections_frees_the_port_and_ends_the_threads() -> None:
    before = threads_of_ours()
    with _serving(timeout_seconds=600.0) as endpoint, _silent(endpoint, 5) as silent:
        _ask(endpoint)
        endpoint.close()
        assert [_read_all(sock) for sock in silent] == [b""] * 5
        with pytest.raises(ConnectionRefusedError):
            _connect(endpoint)
        for thread in threads_of_ours() - before:
            thread.join(PATIENCE_SECONDS)
        assert threads_of_ours() <= before
        again = Endpoint(lambda request: text_response(HTTPStatus.OK, "again"), endpoint.host, endpoint.port)
        assert _ask(again).endswith(b"again\n")
        again.close()


def test_https_serves_metrics_to_a_client_that_checks_the_certificate(
    certificate: tuple[Path, Path], client_context: ssl.SSLContext
) -> None:
    client_context.check_hostname = True
    exporter = PrometheusExporter(PrometheusConfig(port=0, certfile=certificate[0], keyfile=certificate[1]))
    exporter.start(run_info(), lambda: snapshot())
    assert exporter.url is not None
    assert exporter.url.startswith("https://127.0.0.1:")
    port = int(exporter.url.removesuffix("/metrics").rpartition(":")[2])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS) as sock,
        client_context.wrap_socket(sock, server_hostname="127.0.0.1", suppress_ragged_eofs=False) as tls,
    ):
        tls.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        received = _read_all(tls)
    exporter.close("finished")
    assert b"ess_monitor_layers 2.0" in received


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_holds_neither_the_port_nor_a_connection() -> None:
    with _serving(timeout_seconds=600.0) as endpoint, _connect(endpoint) as waiting:
        assert _ask(endpoint).endswith(b"hello\n")
        ready, end = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.close(end[1])
            endpoint.close()
            os.write(ready[1], b"x")
            os.read(end[0], 1)
            os._exit(0)
        try:
            assert os.read(ready[0], 1) == b"x"
            waiting.sendall(GET)
            assert _read_all(waiting).endswith(b"hello\n"), "the parent's connection outlives the fork and ends"
            assert _ask(endpoint).endswith(b"hello\n"), "the parent goes on serving"
            endpoint.close()
            with pytest.raises(ConnectionRefusedError):
                _connect(endpoint)
            again = Endpoint(lambda request: text_response(HTTPStatus.OK, "again"), endpoint.host, endpoint.port)
            assert _ask(again).endswith(b"again\n")
            again.close()
        finally:
            for descriptor in (end[1], end[0], *ready):
                os.close(descriptor)
            assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_an_ipv6_address_is_written_in_brackets() -> None:
    try:
        endpoint = Endpoint(lambda request: text_response(HTTPStatus.OK, "hello"), "::1", 0)
    except OSError:
        pytest.skip("this machine has no ::1")
    assert endpoint.url == f"http://[::1]:{endpoint.port}"
    assert _ask(endpoint).endswith(b"hello\n")
    endpoint.close()


def test_a_parsed_request_has_lower_case_header_names_and_no_query() -> None:
    request = parse_request(b"HEAD /metrics?a=b?c HTTP/1.0\r\nACCEPT-Encoding:  gzip \r\n\r\n")
    assert request == Request("HEAD", "/metrics", {"accept-encoding": "gzip"})


def test_a_bad_request_knows_its_status() -> None:
    with pytest.raises(BadRequest) as caught:
        parse_request(b"hello\r\n\r\n")
    assert caught.value.status is HTTPStatus.BAD_REQUEST
