"""Prometheus: the run's counters on an HTTP(S) endpoint of this process, cut anew for every scrape."""

from __future__ import annotations

import errno
import ssl
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from ess_monitor import validation
from ess_monitor.errors import ConfigError, ExporterError
from ess_monitor.exporters.prometheus.auth import Authenticator, load_credentials
from ess_monitor.exporters.prometheus.base import new_registry, snapshot_collector
from ess_monitor.exporters.prometheus.config import PrometheusConfig
from ess_monitor.exporters.prometheus.discovery import FileSdEntry, advertised_target
from ess_monitor.exporters.prometheus.http.pages import METRICS_PATH, Pages
from ess_monitor.exporters.prometheus.http.server import Endpoint, Linger, make_way
from ess_monitor.exporters.prometheus.http.tls import server_context
from ess_monitor.exporters.prometheus.identity import RunIdentity, identify
from ess_monitor.records import Measurement, RunInfo, RunStatus, Snapshot

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from ess_monitor.exporters.prometheus.collector import SnapshotCollector


class PrometheusExporter:
    """Serves `/metrics` and `/-/healthy`; every other path is a 404.

    `export` has nothing to do: a scrape pulls from `snapshot()`. The endpoint ends with the run, or lingers for
    `config.linger_seconds` and shows the last state. On a rank that `config.ranks` leaves out nothing happens at all.

    Args:
        config: where to listen, who may read, how to be found.
        registry: where the collector is registered; None makes a fresh one.
        identity: run and rank, where the caller knows better than `identify`.

    Example:
        >>> PrometheusExporter(PrometheusConfig(port=0)).url is None  # no address before it has started
        True
    """

    inline = True  # nothing to do in `export`, so no thread is spent on it

    def __init__(
        self,
        config: PrometheusConfig | None = None,
        registry: CollectorRegistry | None = None,
        identity: RunIdentity | None = None,
    ) -> None:
        self.name = "prometheus"
        self.config = validation.optional("config", config, PrometheusConfig) or PrometheusConfig()
        if registry is not None and (isinstance(registry, type) or not hasattr(registry, "register")):
            raise ConfigError(
                f"registry: {validation.type_of(registry)} is no CollectorRegistry; None makes a fresh one"
            )
        self.identity = validation.optional("identity", identity, RunIdentity)
        """Run and rank; known once the exporter has started."""
        self._registry = registry
        self._lock = threading.Lock()  # the end may come from the training thread and from the lingering one
        self._snapshot: Callable[[], Snapshot] | None = None
        self._collector: SnapshotCollector | None = None
        self._endpoint: Endpoint | None = None
        self._entry: FileSdEntry | None = None
        self._linger: Linger | None = None

    @property
    def url(self) -> str | None:
        """Address of the metrics, such as `http://127.0.0.1:9464/metrics`; None while nothing is served."""
        endpoint = self._endpoint
        return None if endpoint is None else f"{endpoint.url}{METRICS_PATH}"

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """Listen, and write the file for service discovery.

        Raises:
            ExporterError: prometheus_client is missing, the address is taken or not of this machine, the certificate or
                the secret cannot be used, the folder for discovery cannot be written to, or the ranks share no run_id.
        """
        config = self.config
        identity = self.identity or identify(config, run)
        if not identity.takes_part(config.ranks):
            self.identity = identity
            return
        collector = snapshot_collector(self.name, run, self._current)
        gate = None if config.auth is None else Authenticator(load_credentials(config.auth))
        tls = None if config.certfile is None else server_context(config.certfile, config.keyfile, config.client_cafile)
        registry = self._registry if self._registry is not None else new_registry()
        self._snapshot = snapshot
        registry.register(collector)
        endpoint: Endpoint | None = None
        try:
            port = config.port if identity.local_rank == 0 else 0
            endpoint = self._listen(Pages(registry, gate), port, tls)
            self._entry = self._announce(identity, endpoint)
        except BaseException:
            registry.unregister(collector)
            self._snapshot = None
            if endpoint is not None:
                endpoint.close()
            raise
        self.identity, self._registry, self._collector, self._endpoint = identity, registry, collector, endpoint

    def export(self, measurement: Measurement) -> None:
        """Nothing: the numbers are pulled."""

    def close(self, status: RunStatus) -> None:
        """End the run: stop serving, or linger with its last state. Returns at once either way."""
        endpoint, snapshot = self._endpoint, self._snapshot
        if endpoint is None or snapshot is None or self._linger is not None:
            return
        if self.config.linger_seconds == 0:
            self.stop()
            return
        try:
            last = snapshot().model_copy(update={"status": status})
        except BaseException:
            self.stop()
            raise
        # What lingers holds numbers only: the model behind `snapshot` can be freed.
        self._snapshot = lambda: last
        self._linger = Linger(endpoint.port, self.config.linger_seconds, self.stop)

    def stop(self) -> None:
        """Stop serving now, lingering or not; a second call does nothing."""
        with self._lock:
            endpoint, self._endpoint = self._endpoint, None
            entry, self._entry = self._entry, None
            collector, self._collector = self._collector, None
            linger, self._linger = self._linger, None
            self._snapshot = None
        if entry is not None:
            entry.remove()  # first, so that nobody is sent to a closed port
        if linger is not None:
            linger.cancel()
        if endpoint is not None:
            endpoint.close()
        if self._registry is not None and collector is not None:
            self._registry.unregister(collector)

    def _current(self) -> Snapshot:
        snapshot = self._snapshot
        if snapshot is None:
            raise ExporterError("the run is over. Keep its last state with linger_seconds.")
        return snapshot()

    def _listen(self, pages: Pages, port: int, tls: ssl.SSLContext | None) -> Endpoint:
        try:
            return Endpoint(pages.respond, self.config.host, port, tls)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and make_way(port):
                return self._listen(pages, port, tls)
            raise ExporterError(_explain(self.config.host, port, error)) from error

    def _announce(self, identity: RunIdentity, endpoint: Endpoint) -> FileSdEntry | None:
        folder = self.config.file_sd_dir
        if folder is None:
            return None
        target = advertised_target(self.config.host, endpoint.port, self.config.advertise_host)
        try:
            return FileSdEntry(folder, identity, target, "http" if self.config.certfile is None else "https")
        except OSError as error:
            raise ExporterError(
                f"prometheus.file_sd_dir={str(folder)!r} cannot be written to ({type(error).__name__}: {error}). "
                "Give a folder this process may write to, or leave file_sd_dir out."
            ) from error


def _explain(host: str, port: int, error: OSError) -> str:
    where = f"prometheus.host={host!r}, port={port}"
    if error.errno == errno.EADDRINUSE:
        return (
            f"{where}: port {port} is in use, by another run perhaps. Set another port, or port=0 to take a free one "
            "(`PrometheusExporter.url` tells which)."
        )
    return (
        f"{where} cannot be listened on ({type(error).__name__}: {error}). Set an address of this machine and a port "
        "above 1023, or port=0 to take a free one."
    )
