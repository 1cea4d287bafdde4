"""Reads one bounded HTTP request and writes one response; the connection ends after it.

Closing after every response keeps idle peers from holding a connection, and makes it unnecessary to parse bodies.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

MAX_REQUEST_BYTES = 16 * 1024
"""Request line and headers together. A scrape sends below 1 KiB; proxies add a few."""


class BadRequest(Exception):
    """The request is answered with an error status."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Disconnected(Exception):
    """The peer closed before its request was complete, so there is nobody to answer."""


@dataclass(frozen=True)
class Request:
    """Holds method, path without its query, and headers with lower-case names (not in `repr`: one may be a secret)."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Response:
    """Holds an answer; `send_response` adds Content-Length and Connection."""

    status: HTTPStatus
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def text_response(status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Make a plain-text response of one line."""
    fixed = {"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff"}
    return Response(status, f"{message}\n".encode(), {**fixed, **(headers or {})})


def receive_request(connection: socket.socket, timeout_seconds: float) -> Request:
    """Read one request; the whole of it must arrive within the timeout, however slowly its bytes drip in.

    Raises:
        BadRequest: it is too large, too slow, or not HTTP.
        Disconnected: the peer closed first.
    """
    deadline = time.monotonic() + timeout_seconds
    received = bytearray()
    while b"\r\n\r\n" not in received and b"\n\n" not in received:
        left = deadline - time.monotonic()
        if left <= 0:
            raise BadRequest(HTTPStatus.REQUEST_TIMEOUT, "the request did not arrive in time")
        connection.settimeout(left)
        try:
            chunk = connection.recv(4096)
        except TimeoutError:
            continue
        if not chunk:
            raise Disconnected
        received += chunk
        if len(received) > MAX_REQUEST_BYTES:
            raise BadRequest(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the request is larger than {MAX_REQUEST_BYTES} bytes"
            )
    return parse_request(bytes(received))


def parse_request(received: bytes) -> Request:
    r"""Parse the head of a request.

    Raises:
        BadRequest: it is not an HTTP/1 request.

    >>> parse_request(b"GET /metrics?x=1 HTTP/1.1\r\nAccept: */*\r\n\r\n")
    Request(method='GET', path='/metrics')
    """
    stream = io.BytesIO(received)
    words = stream.readline().decode("latin-1").split()
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise BadRequest(HTTPStatus.BAD_REQUEST, "this is not an HTTP/1 request")
    try:
        headers = http.client.parse_headers(stream)
    except http.client.HTTPException as error:
        raise BadRequest(HTTPStatus.BAD_REQUEST, "the headers cannot be read") from error
    return Request(
        words[0], words[1].partition("?")[0], {name.lower(): value.strip() for name, value in headers.items()}
    )


def send_response(connection: socket.socket, response: Response, timeout_seconds: float, *, head: bool) -> None:
    """Send a response within the timeout; with `head`, its headers only.

    Raises:
        OSError: the peer does not receive it.
    """
    headers = {**response.headers, "Content-Length": str(len(response.body)), "Connection": "close"}
    lines = [f"HTTP/1.1 {response.status.value} {response.status.phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    payload = "\r\n".join([*lines, "", ""]).encode("latin-1")
    connection.settimeout(timeout_seconds)  # `sendall` applies it to the whole response, over TLS too
    connection.sendall(payload if head else payload + response.body)


def drain(connection: socket.socket, timeout_seconds: float = 0.5, max_bytes: int = 256 * 1024) -> None:
    """Discard what the peer still sends. Raises OSError.

    Closing with unread bytes makes the kernel reset the connection, and the peer would lose the error message.
    """
    deadline = time.monotonic() + timeout_seconds
    while max_bytes > 0 and (left := deadline - time.monotonic()) > 0:
        connection.settimeout(left)
        chunk = socket.socket.recv(connection, 16 * 1024)  # raw bytes, as TLS may be over already
        if not chunk:
            return
        max_bytes -= len(chunk)
