"""Pushes the last state of a run to a Pushgateway, once, when the run ends.

For runs that cannot be scraped, and as a record that outlives them. Values in a Pushgateway never expire, so nothing is
pushed during the run: values of a process that has died would still look healthy.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from ess_monitor import validation
from ess_monitor.errors import ExporterError, format_error
from ess_monitor.exporters.base import final_snapshot
from ess_monitor.exporters.prometheus.auth import AuthConfig, Credentials, load_credentials
from ess_monitor.exporters.prometheus.base import new_collector, new_registry
from ess_monitor.exporters.prometheus.identity import IdentifiedConfig, RunIdentity, identify
from ess_monitor.exporters.prometheus.renewal import Renewed
from ess_monitor.records import Measurement, RunInfo, RunStatus, Snapshot

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class PushgatewayConfig(IdentifiedConfig):
    """Settings of the push at the end of a run."""

    kind: Literal["pushgateway"] = "pushgateway"
    """Which exporter this is."""
    url: str = "http://127.0.0.1:9091"
    """Address of the Pushgateway, without `/metrics`. The default is that of one on this machine."""
    job: str = Field(default="ess-monitor-final", min_length=1)
    """Label `job` of what is pushed; `run_id` and `rank` are the rest of the grouping key. It differs from the
    job of the scraped targets, which the alerts select: a layer that was collapsed at the end would fire for ever."""
    timeout_seconds: float = Field(default=3.0, gt=0, le=60)
    """Limit for connecting and for each answer. Less than the 5 seconds that the end of a run waits for its sinks."""
    auth: AuthConfig | None = None
    """Credentials of the Pushgateway. None by default, as a Pushgateway asks for none by default."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None:
            raise ValueError("must not contain credentials: set auth, which reads them from a file or a variable")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be http://host:port or https://host:port")
        return url.rstrip("/")


class PushgatewayExporter:
    """Pushes all metrics of the run when it ends, whether it finished or failed, replacing an earlier push of the run.

    `start` checks that the Pushgateway answers, so that a mistyped address shows before the training and not after it.
    Errors at the end are counted and logged by the hub, like every error of an exporter.

    Args:
        config: where to push, and as whom.
        identity: run and rank, where the caller knows better than `identify`.
    """

    name = "pushgateway"
    inline = False

    def __init__(self, config: PushgatewayConfig | None = None, identity: RunIdentity | None = None) -> None:
        self.config = validation.optional("config", config, PushgatewayConfig) or PushgatewayConfig()
        self.identity = self._given_identity = validation.optional("identity", identity, RunIdentity)
        """Run and rank; None before the start."""
        self._credentials: Renewed[Credentials] | None = None
        self._run: RunInfo | None = None
        self._snapshot: Callable[[], Snapshot] | None = None

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """Check that the Pushgateway answers.

        Raises:
            ExporterError: prometheus_client is missing, the Pushgateway does not answer or does not accept the
                credentials, their secret cannot be read, or the ranks share no run_id.
        """
        config = self.config
        self.identity = self._given_identity or identify(config, run)
        if not self.identity.takes_part(config.ranks):
            return
        new_collector(self.name, run, snapshot)  # raises now if prometheus_client is missing, and not at the end
        self._credentials = None if config.auth is None else _renewed(config.auth)
        self._check_that_it_answers()
        self._run, self._snapshot = run, snapshot

    def export(self, measurement: Measurement) -> None:
        """Do nothing: only the end of a run is pushed."""

    def close(self, status: RunStatus) -> None:
        """Push the metrics. Raises ExporterError when the Pushgateway refuses them, OSError when it is unreachable."""
        run, snapshot = self._run, self._snapshot
        if run is None or snapshot is None:
            return
        self._run = self._snapshot = None
        last = final_snapshot(snapshot, status)
        self._push(new_registry(new_collector(self.name, run, lambda: last)))

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

    def _check_that_it_answers(self) -> None:
        url = f"{self.config.url}/-/ready"
        try:
            request = urllib.request.Request(url)
            for name, value in self._headers().items():
                request.add_unredirected_header(name, value)  # a redirect must not carry the credentials elsewhere
            with urllib.request.urlopen(request, timeout=self.config.timeout_seconds):
                return
        except urllib.error.HTTPError as error:
            with error:
                # Something answers. A proxy may hide this page, so only refused credentials count as a failure.
                if error.code not in (401, 403):
                    return
            problem = f"answered {error.code} to its credentials. Set auth"
        except (OSError, ValueError) as error:
            problem = f"does not answer ({format_error(error)}). Set the address of a Pushgateway that runs"
        raise ExporterError(f"pushgateway.url={self.config.url!r} {problem}, or leave it out of `exporters`.")

    def _without_credentials(self, answer: str) -> str:
        """Remove the secret from an answer: a verbose proxy quotes the request, headers included."""
        secret = None if self._credentials is None else self._credentials().value.get_secret_value()
        return answer.replace(secret, "...") if secret else answer

    def _headers(self) -> dict[str, str]:
        return {} if self._credentials is None else {"Authorization": self._credentials().header}


def _renewed(auth: AuthConfig) -> Renewed[Credentials]:
    return Renewed("pushgateway.auth.secret_file", [auth.secret_file], lambda: load_credentials(auth))
