"""Serves the run's counters on an HTTP(S) endpoint of this process."""

from __future__ import annotations

import errno
import logging
import ssl
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

from ess_monitor import validation
from ess_monitor.errors import ConfigError, ExporterError, format_error
from ess_monitor.exporters.base import final_snapshot
from ess_monitor.exporters.prometheus.auth import AuthConfig, Authenticator, load_credentials
from ess_monitor.exporters.prometheus.base import new_collector, new_registry
from ess_monitor.exporters.prometheus.config import DEFAULT_PORT, PrometheusConfig
from ess_monitor.exporters.prometheus.discovery import advertised_target, announce
from ess_monitor.exporters.prometheus.http.pages import METRICS_PATH, Pages
from ess_monitor.exporters.prometheus.http.server import Endpoint
from ess_monitor.exporters.prometheus.http.tls import server_context
from ess_monitor.exporters.prometheus.identity import RunIdentity, identify
from ess_monitor.exporters.prometheus.renewal import Renewed
from ess_monitor.records import Measurement, RunInfo, RunStatus, Snapshot
from ess_monitor.runtime.shutdown import close_abandoned

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

logger = logging.getLogger("ess_monitor.exporters")

_serving: WeakSet[PrometheusExporter] = WeakSet()
"""Exporters of this process that have an endpoint. The next run may need the port of one whose run is over."""


class PrometheusExporter:
    """Serves `/metrics` and `/-/healthy`; every other path is a 404.

    `export` does nothing: every scrape calls `snapshot()`. The endpoint ends with the run, or shows the last state for
    another `config.linger_seconds`. On a rank that `config.ranks` leaves out, nothing is served.

    Args:
        config: the address, who may read, and service discovery.
        registry: where the collector is registered; None makes a fresh one.
        identity: run and rank, where the caller knows better than `identify`.

    Examples:
        >>> PrometheusExporter(PrometheusConfig(port=0)).url is None  # no address before it has started
        True
    """

    name = "prometheus"
    inline = True  # `export` does nothing, so it needs no thread

    def __init__(
        self,
        config: PrometheusConfig | None = None,
        registry: CollectorRegistry | None = None,
        identity: RunIdentity | None = None,
    ) -> None:
        self.config = validation.optional("config", config, PrometheusConfig) or PrometheusConfig()
        if registry is not None and (isinstance(registry, type) or not hasattr(registry, "register")):
            raise ConfigError(
                f"registry: {validation.type_of(registry)} is not a CollectorRegistry; None makes a fresh one"
            )
        self.identity = self._given_identity = validation.optional("identity", identity, RunIdentity)
        """Run and rank; None before the start."""
        self._registry = registry
        self._lock = threading.RLock()  # training thread, timer and signal handlers may all call `stop`
        self._snapshot: Callable[[], Snapshot] | None = None
        self._endpoint: Endpoint | None = None
        self._cleanup = ExitStack()
        self._timer: threading.Timer | None = None

    @property
    def url(self) -> str | None:
        """Address of the metrics, such as `http://127.0.0.1:9464/metrics`; None while nothing is served."""
        endpoint = self._endpoint
        return None if endpoint is None else f"{endpoint.url}{METRICS_PATH}"

    @property
    def serves_at(self) -> str | None:
        """The same, for the records of the run."""
        return self.url

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """Start serving, and write the file for service discovery.

        Raises:
            ExporterError: prometheus_client is missing, the address is taken or not one of this machine, the
                certificate or the secret cannot be used, the folder for discovery cannot be written to, or the ranks
                share no run_id.
        """
        config = self.config
        identity = self._given_identity or identify(config, run)
        if not identity.takes_part(config.ranks):
            return
        collector = new_collector(self.name, run, self._current)
        authenticator = None if config.auth is None else _renewed_authenticator(config.auth)
        tls = None if config.certfile is None else _renewed_context(config.certfile, config)
        registry = self._registry if self._registry is not None else new_registry()
        with ExitStack() as cleanup:
            self._snapshot = snapshot
            cleanup.callback(setattr, self, "_snapshot", None)
            registry.register(collector)
            cleanup.callback(registry.unregister, collector)
            endpoint = self._listen(Pages(registry, authenticator), 0 if identity.local_rank else config.port, tls)
            cleanup.callback(endpoint.close)
            if config.file_sd_dir is not None:
                # Called before `endpoint.close`: Prometheus must not be sent to a closed port.
                cleanup.callback(self._announce(config.file_sd_dir, identity, endpoint))
            self.identity = identity
            self._endpoint, self._cleanup = endpoint, cleanup.pop_all()
            _serving.add(self)

    def export(self, measurement: Measurement) -> None:
        """Do nothing: Prometheus pulls the numbers."""

    def close(self, status: RunStatus) -> None:
        """Stop serving, now or after `linger_seconds`; now where the process is about to end. Returns at once."""
        endpoint, snapshot = self._endpoint, self._snapshot
        if endpoint is None or snapshot is None or self._timer is not None:
            return
        if self.config.linger_seconds == 0 or status == "terminated":
            self.stop()
            return
        try:
            last = final_snapshot(snapshot, status)
        except BaseException:
            self.stop()
            raise
        self._snapshot = lambda: last  # keeps numbers only: the model behind `snapshot` can be freed
        self._timer = threading.Timer(self.config.linger_seconds, self.stop)
        self._timer.name = "ess-monitor-linger"
        self._timer.daemon = True  # a process that ends does not wait
        self._timer.start()

    def stop(self) -> None:
        """Stop serving now, lingering or not; a second call does nothing."""
        with self._lock:
            cleanup, self._cleanup = self._cleanup, ExitStack()
            timer, self._timer = self._timer, None
            self._endpoint = self._snapshot = None
        _serving.discard(self)
        if timer is not None:
            timer.cancel()
        cleanup.close()

    def _current(self) -> Snapshot:
        snapshot = self._snapshot
        if snapshot is None:
            raise ExporterError("the run is over. Keep its last state with linger_seconds.")
        return snapshot()

    def _listen(self, pages: Pages, asked: int | None, tls: Callable[[], ssl.SSLContext] | None) -> Endpoint:
        """Listen on the port that was asked for; on the default one or else a free one where none was."""
        port = DEFAULT_PORT if asked is None else asked
        try:
            return Endpoint(pages.respond, self.config.host, port, tls)
        except OSError as error:
            other = next((e for e in list(_serving) if e.serves(port)), None)
            if error.errno == errno.EADDRINUSE and other is not None and other.release():
                return self._listen(pages, asked, tls)
            if error.errno == errno.EADDRINUSE and asked is None:
                endpoint = self._listen(pages, 0, tls)
                logger.warning(
                    "exporter 'prometheus': port %d is in use, perhaps by another run; the metrics of this one are at "
                    "%s%s. Set `port` to choose one, or `file_sd_dir` so that Prometheus finds it.",
                    port,
                    endpoint.url,
                    METRICS_PATH,
                )
                return endpoint
            raise ExporterError(_cannot_listen(self.config.host, port, error, here=other is not None)) from error

    def serves(self, port: int) -> bool:
        """Return whether this exporter serves on a port."""
        endpoint = self._endpoint
        return endpoint is not None and endpoint.port == port

    def release(self) -> bool:
        """Stop serving if the run is over, lingering or abandoned; return whether it was."""
        if self._timer is None:
            return close_abandoned(lambda monitor: any(each is self for each in monitor.exporters), "address")
        self.stop()
        return True

    def _announce(self, folder: Path, identity: RunIdentity, endpoint: Endpoint) -> Callable[[], object]:
        target = advertised_target(self.config.host, endpoint.port, self.config.advertise_host)
        try:
            return announce(folder, identity, target, endpoint.url.partition(":")[0], endpoint)
        except OSError as error:
            raise ExporterError(
                f"prometheus.file_sd_dir={str(folder)!r} cannot be written to ({format_error(error)}). "
                "Give a folder this process may write to, or leave file_sd_dir out."
            ) from error


def _renewed_authenticator(auth: AuthConfig) -> Renewed[Authenticator]:
    make = lambda: Authenticator(load_credentials(auth))  # noqa: E731
    return Renewed("prometheus.auth.secret_file", [auth.secret_file], make)


def _renewed_context(certfile: Path, config: PrometheusConfig) -> Renewed[ssl.SSLContext]:
    files = (certfile, config.keyfile, config.client_cafile)
    return Renewed("prometheus.certfile, keyfile or client_cafile", files, lambda: server_context(*files))


def _cannot_listen(host: str, port: int, error: OSError, *, here: bool) -> str:
    where = f"prometheus.host={host!r}, port={port}"
    if error.errno == errno.EADDRINUSE:
        user = (
            " by another monitor of this process that was not closed. Call its close() if its run is over, or set"
            if here
            else ", perhaps by another run. Set"
        )
        return (
            f"{where}: port {port} is in use{user} another port, or port=0 to take a free one "
            "(`PrometheusExporter.url` holds it)."
        )
    return (
        f"{where}: this process cannot listen there ({format_error(error)}). Set an address of this machine and a port "
        "above 1023, or port=0 to take a free one."
    )
