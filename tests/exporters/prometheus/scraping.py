"""One HTTP request as the tests make it: status, headers, body, and no exception for an error status."""

from __future__ import annotations

import base64
import ssl
import urllib.error
import urllib.request
from typing import NamedTuple


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def ask(url: str | None, method: str = "GET", context: ssl.SSLContext | None = None, **headers: str) -> Answer:
    """The answer to one request; underscores in the names of `headers` stand for dashes."""
    assert url is not None, "nothing is served"
    request = urllib.request.Request(url, method=method, headers={k.replace("_", "-"): v for k, v in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=30, context=context) as response:
            return Answer(response.status, dict(response.headers), response.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, dict(error.headers), error.read())


def basic(username: str, password: str) -> str:
    """An Authorization header."""
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()
