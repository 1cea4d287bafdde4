"""The endpoint against peers that are slow in every way there is, and against the workers of a DataLoader."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ess_monitor.exporters import PrometheusConfig, PrometheusExporter
from ess_monitor.exporters.prometheus.http.request import Request, Response, text_response
from ess_monitor.exporters.prometheus.http.server import Endpoint
from tests.exporters.helpers import run_info, snapshot, threads_of_ours
from tests.exporters.prometheus.scraping import ask

PEERS = 200
MAX_CONNECTIONS = 16
PATIENCE_SECONDS = 30.0
LARGE = Response(HTTPStatus.OK, b"x" * 8_000_000)
"""More than the buffers of a connection take: a peer that does not read holds up its sender."""


def _respond(request: Request) -> Response:
    return LARGE if request.path == "/large" else text_response(HTTPStatus.OK, "hello")


@contextlib.contextmanager
def _serving(tls: ssl.SSLContext | None = None, timeout_seconds: float = 600.0) -> Iterator[Endpoint]:
    context = None if tls is None else lambda: tls
    endpoint = Endpoint(_respond, "127.0.0.1", 0, context, MAX_CONNECTIONS, timeout_seconds)
    try:
        yield endpoint
    finally:
        endpoint.close()


def _connect(endpoint: Endpoint) -> socket.socket:
    return socket.create_connection((endpoint.host, endpoint.port), timeout=PATIENCE_SECONDS)


@contextlib.contextmanager
def _peers(endpoint: Endpoint, sent: bytes, context: ssl.SSLContext | None) -> Iterator[list[socket.socket]]:
    """Peers that have sent this and now take their time."""
    with contextlib.ExitStack() as stack:
        peers = []
        for _ in range(PEERS):
            peer = stack.enter_context(_connect(endpoint))
            if context is not None:
                peer = stack.enter_context(context.wrap_socket(peer))
            peer.sendall(sent)
            peers.append(peer)
        yield peers


def _wait_for_few_threads() -> None:
    """Until no more scrapes are under way than there may be; those that were cut may be on their way out."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        count = sum(thread.name == "ess-monitor-scrape" for thread in threads_of_ours())
        if count <= MAX_CONNECTIONS:
            return
        assert time.monotonic() < deadline, f"{count} threads for {MAX_CONNECTIONS} connections"
        time.sleep(0.01)


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize(
    "sent",
    [b"GET / HTTP/1.1\r\nx: ", b"GET /large HTTP/1.1\r\n\r\n"],
    ids=["requests that never end", "answers that are never read"],
)
def test_two_hundred_slow_peers_do_not_hold_up_a_scrape(sent: bytes, tls: bool, request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue("tls_server_context") if tls else None
    client = request.getfixturevalue("client_context") if tls else None
    # Nothing times out within the test: the answer must not depend on the slow ones being given up.
    with _serving(server) as endpoint, _peers(endpoint, sent, client) as peers:
        for drip in range(3):
            for peer in peers[-MAX_CONNECTIONS:]:
                with contextlib.suppress(OSError):
                    peer.sendall(b"x")
            assert ask(f"{endpoint.url}/", context=client).body == b"hello\n", drip
        _wait_for_few_threads()


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_a_peer_that_sips_its_answer_is_let_go(tls: bool, request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue("tls_server_context") if tls else None
    client = request.getfixturevalue("client_context") if tls else None
    with _serving(server, timeout_seconds=1.0) as endpoint, contextlib.ExitStack() as stack:
        peer = stack.enter_context(socket.socket())
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)  # the answer must not wait in here
        peer.settimeout(PATIENCE_SECONDS)
        peer.connect((endpoint.host, endpoint.port))
        if client is not None:
            peer = stack.enter_context(client.wrap_socket(peer))
        peer.sendall(b"GET /large HTTP/1.1\r\n\r\n")
        received = 0
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            # Each write of the server makes progress well within its timeout; all of them together do not.
            while chunk := peer.recv(16 * 1024):
                received += len(chunk)
                time.sleep(0.005)
        assert 0 < received < len(LARGE.body)


def test_requests_that_are_too_large_come_from_many_at_once_and_go() -> None:
    with _serving(timeout_seconds=5.0) as endpoint:
        answers: list[bytes] = []

        def send() -> None:
            with _connect(endpoint) as peer, contextlib.suppress(ConnectionError):
                peer.sendall(b"GET / HTTP/1.1\r\nx: " + b"a" * 100_000)
                answers.append(peer.recv(12))

        senders = [threading.Thread(target=send) for _ in range(20)]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join(PATIENCE_SECONDS)
        assert set(answers) <= {b"HTTP/1.1 431", b""}
        assert b"HTTP/1.1 431" in answers
        assert ask(f"{endpoint.url}/").body == b"hello\n"


class _Numbers(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_workers_of_a_data_loader_hold_neither_port_nor_scrape() -> None:
    config = PrometheusConfig(port=0)
    exporter = PrometheusExporter(config)
    exporter.start(run_info(), lambda: snapshot())
    assert exporter.url is not None
    url, port = exporter.url, int(exporter.url.rpartition(":")[2].removesuffix("/metrics"))
    loader = DataLoader(
        _Numbers(), batch_size=4, num_workers=2, multiprocessing_context="fork", persistent_workers=True
    )
    batches = iter(loader)
    next(batches)
    assert ask(url).status == 200, "while the workers are there"
    exporter.close("finished")
    # The workers live on; the port must be free for the next run all the same.
    again = PrometheusExporter(PrometheusConfig(port=port))
    again.start(run_info(run_name="again"), lambda: snapshot())
    assert b'run_name="again"' in ask(url).body
    next(batches)
    again.close("finished")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS)
    del batches, loader
