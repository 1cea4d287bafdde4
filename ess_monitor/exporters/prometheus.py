"""Prometheus: the run's counters on an HTTP(S) endpoint of this process, cut anew for every scrape."""

from __future__ import annotations

import errno
import gzip
import ipaddress
import logging
import ssl
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ess_monitor.errors import ExporterError
from ess_monitor.exporters.endpoint import Endpoint
from ess_monitor.exporters.http_request import Request, Response, text_response
from ess_monitor.records import Measurement, RunInfo, RunStatus, Snapshot

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from ess_monitor.exporters.collector import SnapshotCollector

logger = logging.getLogger("ess_monitor.exporters")


class PrometheusConfig(BaseModel):
    """Settings of the Prometheus endpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["prometheus"] = "prometheus"
    """Which exporter this is."""
    host: str = "127.0.0.1"
    """Address to listen on. Loopback by default: the endpoint has no authentication."""
    port: int = Field(default=9464, ge=0, le=65535)
    """Port to listen on; 0 takes a free one, which `PrometheusExporter.url` tells. 9464 is also the habit of
    OpenTelemetry's Prometheus exporters."""
    allow_remote: bool = False
    """Allows a `host` that other machines can reach: everybody who can reach it can then read the metrics."""
    certfile: Path | None = None
    """PEM file with the certificate (chain); given, the endpoint speaks HTTPS only."""
    keyfile: Path | None = None
    """PEM file with the private key, where it is not in `certfile`."""

    @model_validator(mode="after")
    def _check(self) -> PrometheusConfig:
        if not self.allow_remote and not _is_loopback(self.host):
            raise ValueError(
                f"host={self.host!r} can be reached from other machines, and the endpoint has no authentication: "
                "use 127.0.0.1, ::1 or localhost, or set allow_remote=True where the network itself is trusted"
            )
        if self.keyfile is not None and self.certfile is None:
            raise ValueError(f"keyfile={str(self.keyfile)!r} is of no use without certfile: give both or neither")
        return self


class PrometheusExporter:
    """Serves `/metrics` and `/-/healthy`; every other path is a 404.

    `export` has nothing to do: a scrape pulls from `snapshot()`. The endpoint ends with the run.

    Args:
        config: where to listen.
        registry: where the collector is registered; None makes a fresh one. Never the client's global registry, where a
            second run in the same process would clash with the first.

    Example:
        >>> PrometheusExporter(PrometheusConfig(port=0)).url is None  # no address before it has started
        True
    """

    inline = True  # nothing to do in `export`, so no thread is spent on it

    def __init__(self, config: PrometheusConfig | None = None, registry: CollectorRegistry | None = None) -> None:
        self.name = "prometheus"
        self.config = config or PrometheusConfig()
        self._registry = registry
        self._collector: SnapshotCollector | None = None
        self._endpoint: Endpoint | None = None
        self._complained = False

    @property
    def url(self) -> str | None:
        """Address of the metrics, such as `http://127.0.0.1:9464/metrics`; None while it is not running."""
        return None if self._endpoint is None else f"{self._endpoint.url}/metrics"

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """Listen.

        Raises:
            ExporterError: prometheus_client is missing, the address is taken or not of this machine, or the certificate
                cannot be used.
        """
        try:
            from prometheus_client import CollectorRegistry

            from ess_monitor.exporters.collector import SnapshotCollector
        except ImportError as error:
            raise ExporterError(
                f"the Prometheus exporter needs prometheus_client ({error}). Install it with "
                "`pip install prometheus-client`, or leave `prometheus` out of `exporters`."
            ) from error
        tls = self._server_context()
        registry = self._registry if self._registry is not None else CollectorRegistry()
        collector = SnapshotCollector(run, snapshot)
        try:
            endpoint = Endpoint(self._respond, self.config.host, self.config.port, tls)
        except OSError as error:
            raise ExporterError(self._explain(error)) from error
        self._registry, self._collector, self._endpoint = registry, collector, endpoint
        registry.register(collector)

    def export(self, measurement: Measurement) -> None:
        """Nothing: the numbers are pulled."""

    def close(self, status: RunStatus) -> None:
        """Stop serving."""
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None
        if self._registry is not None and self._collector is not None:
            self._registry.unregister(self._collector)
            self._collector = None

    def _respond(self, request: Request) -> Response:
        if request.path not in ("/metrics", "/-/healthy"):
            return text_response(HTTPStatus.NOT_FOUND, "not found; there are /metrics and /-/healthy")
        if request.method not in ("GET", "HEAD"):
            return text_response(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD", {"Allow": "GET, HEAD"})
        if request.path == "/-/healthy":
            return text_response(HTTPStatus.OK, "ok")
        try:
            return self._scrape(request)
        except Exception as error:
            if not self._complained:
                self._complained = True
                logger.warning(
                    "exporter %r answers scrapes with status 500: %s: %s. The training goes on; further errors of this "
                    "kind are not logged.",
                    self.name,
                    type(error).__name__,
                    error,
                )
            raise

    def _scrape(self, request: Request) -> Response:
        from prometheus_client.exposition import choose_encoder, gzip_accepted

        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        registry = self._registry
        assert registry is not None
        body = encode(registry)
        headers = {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"}
        if gzip_accepted(request.headers.get("accept-encoding", "")):
            body = gzip.compress(body, compresslevel=1)  # text this repetitive shrinks tenfold at the cheapest level
            headers["Content-Encoding"] = "gzip"
        return Response(HTTPStatus.OK, body, headers)

    def _server_context(self) -> ssl.SSLContext | None:
        if self.config.certfile is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            # Without a password function OpenSSL would ask for one on the terminal, and the run would hang there.
            context.load_cert_chain(self.config.certfile, self.config.keyfile, password=lambda: "")
        except (OSError, ValueError) as error:
            raise ExporterError(
                f"prometheus.certfile={str(self.config.certfile)!r}, keyfile={str(self.config.keyfile)!r} cannot be "
                f"used ({type(error).__name__}: {error}). Give PEM files of a certificate and its key without password."
            ) from error
        return context

    def _explain(self, error: OSError) -> str:
        where = f"prometheus.host={self.config.host!r}, port={self.config.port}"
        if error.errno == errno.EADDRINUSE:
            return (
                f"{where}: port {self.config.port} is in use, by another run perhaps. Set another port, or port=0 to "
                "take a free one (`PrometheusExporter.url` tells which)."
            )
        return (
            f"{where} cannot be listened on ({type(error).__name__}: {error}). Set an address of this machine and a "
            "port above 1023, or port=0 to take a free one."
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name may resolve to anything, and to something else tomorrow
        return False
