"""Whatever bytes a peer sends, the endpoint's parser gives a request or a refusal."""

from __future__ import annotations

import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ess_monitor.exporters.prometheus.http.request import (
    MAX_REQUEST_BYTES,
    BadRequest,
    Disconnected,
    Request,
    parse_request,
    receive_request,
)
from tests.fuzz.inputs import fuzz, mutated

SCRAPE = (
    b"GET /metrics?name=x HTTP/1.1\r\nHost: localhost:9464\r\nAccept: application/openmetrics-text;version=1.0.0\r\n"
    b"Authorization: Bearer 0123\r\nX-Prometheus-Scrape-Timeout-Seconds: 10\r\n\r\n"
)
PIECES = [
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b":", b" ", b"\t", b"\0", b"\xff", b"\x85", b"\xa0", b"\x1c", b"HTTP/1.1",
    b"HTTP/2", b"=?utf-8?q?=ff?=", b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n", b"a: b\r\n", b"%00",
    b"?", b"From x\r\n", b" folded\r\n", b"Content-Type: multipart/mixed; boundary=x\r\n", b"--x\r\n",
]  # fmt: skip
REQUESTS = st.one_of(
    mutated(SCRAPE, PIECES), st.lists(st.sampled_from(PIECES), max_size=300).map(b"".join), st.binary()
)


def is_refusal(error: BadRequest) -> None:
    assert 400 <= error.status < 500


def check(request: Request) -> None:
    assert request.method
    assert not set(request.method + request.path) & set(" \r\n")
    assert "?" not in request.path
    assert all(name == name.lower() and value == value.strip() for name, value in request.headers.items())
    assert "0123" not in repr(request)


@fuzz(usual=1200, long=70_000)
@given(REQUESTS)
@example(SCRAPE)
@example(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 2000 + b"\r\n")
@example(b"GET / HTTP/1.1\r\na: " + b"b" * 70_000 + b"\r\n\r\n")
@example(b"GET / HTTP/1.1\r\na:\r\n" + b" b\r\n" * 4000 + b"\r\n")
def test_bytes_are_a_request_or_a_bad_request(received: bytes) -> None:
    try:
        request = parse_request(received)
    except BadRequest as error:
        is_refusal(error)
        return
    check(request)


@fuzz(usual=150, long=3000)
@given(REQUESTS, st.integers(1, 400))
@example(b"x" * (2 * MAX_REQUEST_BYTES), 400)
def test_a_stream_is_a_request_a_refusal_or_a_peer_that_left(sent: bytes, chunk: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for start in range(0, len(sent), max(chunk, len(sent) // 8)):
            theirs.sendall(sent[start : start + max(chunk, len(sent) // 8)])
        theirs.shutdown(socket.SHUT_WR)
        try:
            check(receive_request(ours, timeout_seconds=30))
        except BadRequest as error:
            is_refusal(error)
        except Disconnected:
            assert b"\r\n\r\n" not in sent
            assert b"\n\n" not in sent


def test_no_more_is_read_than_a_request_may_have() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"a" * (MAX_REQUEST_BYTES + 8192))
        with pytest.raises(BadRequest, match="larger than"):
            receive_request(ours, timeout_seconds=30)
        ours.settimeout(0)
        assert ours.recv(8192)
