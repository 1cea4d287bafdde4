"""Pushgateway: the last state of a run, pushed once when it ends.

For runs that nobody can scrape, and as a record that outlives them. A Pushgateway never forgets by itself, so nothing
is pushed while the run goes on: a value that stays when its process died would say that all is well.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from ess_monitor import validation
from ess_monitor.errors import ExporterError
from ess_monitor.exporters.prometheus.auth import AuthConfig, Credentials, load_credentials
from ess_monitor.exporters.prometheus.base import new_registry, snapshot_collector
from ess_monitor.exporters.prometheus.identity import IdentifiedConfig, RunIdentity, identify
from ess_monitor.records import Measurement, RunInfo, RunStatus, Snapshot

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class PushgatewayConfig(IdentifiedConfig):
    """Settings of the push at the end of a run."""

    kind: Literal["pushgateway"] = "pushgateway"
    """Which exporter this is."""
    url: str = "http://127.0.0.1:9091"
    """Address of the Pushgateway, without `/metrics`. The default is where one on this machine listens by itself."""
    job: str = Field(default="ess-monitor-final", min_length=1)
    """Label `job` of what is pushed; `run_id` and `rank` are the rest of the grouping key. Not the job of the scraped
    targets: the alerts look at that one, and a layer that was collapsed at the end would be reported for ever."""
    timeout_seconds: float = Field(default=3.0, gt=0, le=60)
    """For connecting and for each answer. Less than the 5 seconds that the end of a run may wait for its sinks."""
    auth: AuthConfig | None = None
    """Credentials of the Pushgateway. None, as it has none unless it is told to."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None:
            raise ValueError("url must not contain credentials: set auth, which reads them from a file or a variable")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url must be http://host:port or https://host:port")
        return url.rstrip("/")


class PushgatewayExporter:
    """Pushes all metrics of the run when it ends, whether it finished or failed, replacing an earlier push of the run.

    The Pushgateway is asked for an answer at the start, so that a mistyped address shows before the training and not
    after. What goes wrong at the end is counted and logged by the hub, like every error of an exporter.

    Args:
        config: where to push, and as whom.
        identity: run and rank, where the caller knows better than `identify`.
    """

    inline = False

    def __init__(self, config: PushgatewayConfig | None = None, identity: RunIdentity | None = None) -> None:
        self.name = "pushgateway"
        self.config = validation.optional("config", config, PushgatewayConfig) or PushgatewayConfig()
        self.identity = validation.optional("identity", identity, RunIdentity)
        """Run and rank; known once the exporter has started."""
        self._credentials: Credentials | None = None
        self._run: RunInfo | None = None
        self._snapshot: Callable[[], Snapshot] | None = None

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """See whether the Pushgateway answers.

        Raises:
            ExporterError: prometheus_client is missing, the Pushgateway does not answer or does not accept the
                credentials, their secret cannot be read, or the ranks share no run_id.
        """
        config = self.config
        self.identity = self.identity or identify(config, run)
        if not self.identity.takes_part(config.ranks):
            return
        snapshot_collector(self.name, run, snapshot)
        self._credentials = None if config.auth is None else load_credentials(config.auth)
        self._knock()
        self._run, self._snapshot = run, snapshot

    def export(self, measurement: Measurement) -> None:
        """Nothing: only the end of a run is pushed."""

    def close(self, status: RunStatus) -> None:
        """Push. Raises ExporterError when the Pushgateway does not take it, or OSError when it is not there."""
        run, snapshot = self._run, self._snapshot
        if run is None or snapshot is None:
            return
        self._run = self._snapshot = None
        last = snapshot().model_copy(update={"status": status})
        registry = new_registry()
        registry.register(snapshot_collector(self.name, run, lambda: last))
        self._push(registry)

    def _push(self, registry: CollectorRegistry) -> None:
        from prometheus_client.exposition import default_handler, push_to_gateway

        def send(
            url: str, method: str, timeout: float | None, headers: list[tuple[str, str]], data: bytes
        ) -> Callable[[], None]:
            return default_handler(url, method, timeout, [*headers, *self._headers().items()], data)

        assert self.identity is not None
        try:
            push_to_gateway(
                self.config.url,
                job=self.config.job,
                registry=registry,
                grouping_key=self.identity.labels,
                timeout=self.config.timeout_seconds,
                handler=send,
            )
        except urllib.error.HTTPError as error:
            with error:
                reason = self._without_credentials(error.read(500).decode("utf-8", "replace").strip())
            raise ExporterError(f"pushgateway.url={self.config.url!r} answered {error.code}: {reason}") from None

    def _knock(self) -> None:
        url = f"{self.config.url}/-/ready"
        try:
            request = urllib.request.Request(url)
            for name, value in self._headers().items():
                request.add_unredirected_header(name, value)  # credentials are for this address, not for the next
            with urllib.request.urlopen(request, timeout=self.config.timeout_seconds):
                return
        except urllib.error.HTTPError as error:
            with error:
                # Something is there. A proxy may hide this page, so only a refusal of the credentials is one.
                if error.code not in (401, 403):
                    return
            problem = f"answered {error.code} to its credentials. Set auth"
        except (OSError, ValueError) as error:
            problem = f"does not answer ({type(error).__name__}: {error}). Set the address of a Pushgateway that runs"
        raise ExporterError(f"pushgateway.url={self.config.url!r} {problem}, or leave it out of `exporters`.")

    def _without_credentials(self, answer: str) -> str:
        """A proxy that is set to explain itself answers with the request, headers and all."""
        secret = None if self._credentials is None else self._credentials.value.get_secret_value()
        return answer.replace(secret, "...") if secret else answer

    def _headers(self) -> dict[str, str]:
        return {} if self._credentials is None else {"Authorization": self._credentials.header}
