"""Serves HTTP(S) beside a training: peers cannot block it, and it never blocks the training.

- Accepting reads nothing from the peer. Handshake and request are read on the connection's own thread, each under a
  deadline, so that a silent peer, with or without TLS, never holds up a scrape.
- At most `max_connections` are open. One more cuts the oldest that has not sent its request yet (or else the oldest of
  all), so that a new scrape is served at once, however many silent peers are connected.
- The accepting thread sleeps until there is something to do; closing wakes it and takes milliseconds.
- A forked child (a DataLoader worker) drops the listener and the connections it inherited, so that the port is free
  when the parent ends, and no scrape waits for a process that will not answer.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import ssl
import threading
import weakref
from collections.abc import Callable
from http import HTTPStatus

from ess_monitor.exporters.prometheus.http.request import (
    BadRequest,
    Disconnected,
    Request,
    Response,
    drain,
    receive_request,
    send_response,
    text_response,
)

Handler = Callable[[Request], Response]

_MAX_HANDLERS = 4
"""Responses made at a time. More would only compete for the interpreter, with each other and with the training."""


class Endpoint:
    """Serves `handler` on one address until closed.

    Args:
        handler: makes the response; called on the connection's thread. What it raises becomes a 500 without details.
        host: address to listen on.
        port: 0 takes a free one.
        tls: returns the server context of a connection; None serves plain HTTP.
        max_connections: open connections at a time.
        timeout_seconds: for the handshake, for the request, and for the response, each.

    Raises:
        OSError: the address cannot be bound.
    """

    def __init__(
        self,
        handler: Handler,
        host: str,
        port: int,
        tls: Callable[[], ssl.SSLContext] | None = None,
        max_connections: int = 64,
        timeout_seconds: float = 5.0,
    ) -> None:
        self._handler = handler
        self._tls = tls
        self._max_connections = max_connections
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._connections: dict[_Connection, None] = {}  # oldest first
        self._handlers = threading.BoundedSemaphore(_MAX_HANDLERS)
        self._closed = False
        self._listener = _listen(host, port)
        self.host: str = self._listener.getsockname()[0]
        """Address that is bound."""
        self.port: int = self._listener.getsockname()[1]
        """Port that is bound."""
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._thread = threading.Thread(target=self._accept_forever, name="ess-monitor-endpoint", daemon=True)
        this = weakref.ref(self)  # a fork hook cannot be removed, and must not keep the endpoint alive
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=lambda: _drop_sockets_in_child(this))
        self._thread.start()

    @property
    def url(self) -> str:
        """Scheme, address and port: `http://127.0.0.1:9464`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}"

    def close(self) -> None:
        """Stop listening and cut every connection; a second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._wake_sender.send(b"x")
        self._thread.join()
        self._cut_down_to(0)
        for sock in (self._listener, self._wake_receiver, self._wake_sender):
            sock.close()

    def _accept_forever(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake_receiver, selectors.EVENT_READ)
            while True:
                selector.select()
                if self._closed:
                    return
                try:
                    sock, _ = self._listener.accept()
                except BlockingIOError:
                    continue  # the peer gave up between select and accept
                except OSError:
                    # Out of file descriptors, most likely: the connection stays pending, so select would spin.
                    self._cut_down_to(0)
                    selector.unregister(self._listener)
                    selector.select(timeout=0.1)
                    selector.register(self._listener, selectors.EVENT_READ)
                    continue
                self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        self._cut_down_to(self._max_connections - 1)
        connection = _Connection(sock)
        with self._lock:
            self._connections[connection] = None
        thread = threading.Thread(target=self._serve, args=(connection,), name="ess-monitor-scrape", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the process cannot start another thread
            self._end(connection)

    def _cut_down_to(self, keep: int) -> None:
        """Cut connections until `keep` are left."""
        while True:
            with self._lock:
                if len(self._connections) <= keep:
                    return
                silent = (connection for connection in self._connections if not connection.has_requested)
                oldest = next(silent, None) or next(iter(self._connections))
                del self._connections[oldest]
            oldest.cut()

    def _serve(self, connection: _Connection) -> None:
        # Whatever a peer does (resets, garbage instead of a handshake) ends its own connection and nothing else.
        try:
            with contextlib.suppress(OSError, ValueError, Disconnected):
                if self._tls is not None:
                    connection.handshake(self._tls(), self._timeout_seconds)
                self._respond(connection)
        finally:
            self._end(connection)

    def _end(self, connection: _Connection) -> None:
        """End a connection, on the thread that reads and writes it."""
        with self._lock:
            self._connections.pop(connection, None)
        connection.cut()
        connection.close()

    def _respond(self, connection: _Connection) -> None:
        sock = connection.sock
        head = False
        try:
            request = receive_request(sock, self._timeout_seconds)
            connection.has_requested = True
            head = request.method == "HEAD"
            response = self._handle(request)
        except BadRequest as error:
            response = text_response(error.status, str(error))
        send_response(sock, response, self._timeout_seconds, head=head)
        connection.finish()
        if response.status is not HTTPStatus.OK:
            drain(sock)

    def _handle(self, request: Request) -> Response:
        # A handler that hangs must not collect one thread per scrape for the rest of the run.
        if not self._handlers.acquire(timeout=self._timeout_seconds):
            return text_response(HTTPStatus.SERVICE_UNAVAILABLE, "busy")
        try:
            return self._handler(request)
        except Exception:
            return text_response(HTTPStatus.INTERNAL_SERVER_ERROR, "the response could not be made")
        finally:
            self._handlers.release()


class _Connection:
    """Wraps one accepted socket. Any thread may call `cut` at any time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.has_requested = False
        """True once the whole request has arrived."""
        self._lock = threading.Lock()
        self._is_cut = False

    def handshake(self, context: ssl.SSLContext, timeout_seconds: float) -> None:
        """Do the TLS handshake, on this connection's own thread. Raises OSError."""
        with self._lock:
            if self._is_cut:
                raise ConnectionAbortedError
            self.sock.settimeout(timeout_seconds)
            self.sock = context.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
        assert isinstance(self.sock, ssl.SSLSocket)
        self.sock.do_handshake()

    def finish(self) -> None:
        """Tell the peer that the response is complete. Raises OSError."""
        if isinstance(self.sock, ssl.SSLSocket):
            self.sock.settimeout(0)  # sends the closing alert without waiting for the peer's
            with contextlib.suppress(OSError, ValueError):
                self.sock.unwrap()
        # Ends the stream even while some forked process still holds a copy of the descriptor.
        socket.socket.shutdown(self.sock, socket.SHUT_WR)

    def cut(self) -> None:
        """End the connection. The call of the thread that reads or writes it fails, and that thread closes it."""
        with self._lock, contextlib.suppress(OSError):
            self._is_cut = True
            # Not SSLSocket's own method: it drops the TLS state that the other thread is using.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the descriptor; only the thread that reads and writes may do this."""
        with self._lock:
            self.sock.close()


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere the option would let two processes share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)  # a burst that overflows the backlog costs the next scrape a second of retrying
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _drop_sockets_in_child(this: weakref.ref[Endpoint]) -> None:
    endpoint = this()
    if endpoint is None or endpoint._closed:
        return
    # Take no lock: a thread of the parent may have held it, and nothing in this process would release it.
    endpoint._closed = True
    for connection in list(endpoint._connections):
        with contextlib.suppress(OSError):
            os.close(connection.sock.detach())  # this process's copy; the connection itself stays open
    for sock in (endpoint._listener, endpoint._wake_receiver, endpoint._wake_sender):
        sock.close()
