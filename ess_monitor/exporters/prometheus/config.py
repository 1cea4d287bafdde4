"""Defines the settings of the Prometheus endpoint."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ess_monitor.exporters.prometheus.auth import AuthConfig
from ess_monitor.exporters.prometheus.identity import IdentifiedConfig

DEFAULT_PORT = 9464
"""The endpoint's port where none is set and it is free."""


class PrometheusConfig(IdentifiedConfig):
    """Settings of the Prometheus endpoint.

    Examples:
        >>> PrometheusConfig(host="0.0.0.0", auth={"secret_env": "METRICS_TOKEN"}).auth.secret_env
        'METRICS_TOKEN'
    """

    kind: Literal["prometheus"] = "prometheus"
    """Which exporter this is."""
    host: str = "127.0.0.1"
    """Address to listen on; "0.0.0.0" is all of IPv4, "::" all of IPv6. Loopback by default: only the user decides who
    else may see the metrics."""
    port: int | None = Field(default=None, ge=0, le=65535)
    """Port to listen on; one that is in use is an error. 0 takes a free one, which `PrometheusExporter.url` holds.
    None: 9464, as for OpenTelemetry's Prometheus exporters, or a free one where that is in use, so that two runs on one
    machine need no settings. Only the first process of a run on a machine uses it, others take a free one."""
    auth: AuthConfig | None = None
    """Credentials that `/metrics` asks for. None by default: only users of the same machine reach the default
    address."""
    allow_unauthenticated: bool = False
    """Allows a `host` that other machines can reach without `auth` or `client_cafile`: everybody who can reach it can
    then read the metrics."""
    certfile: Path | None = None
    """PEM file with the certificate (chain), for HTTPS only. None: credentials and metrics cross the network in plain
    text."""
    keyfile: Path | None = None
    """PEM file with the private key. None: the key is in `certfile`."""
    client_cafile: Path | None = None
    """PEM file of an authority: only clients with a certificate signed by it can connect (mutual TLS). None: every
    client can connect, and `auth` decides who may read."""
    linger_seconds: float = Field(default=0.0, ge=0, le=3600)
    """How long the endpoint stays after the end of the run, so that a scrape sees its last state. Nothing waits for it:
    it ends with the process, or when a second run in the process needs the port. 0 by default, which frees the port
    with the run; two scrape intervals are enough if the process goes on."""
    file_sd_dir: Path | None = None
    """Folder for `<run_id>-<rank>.json` with the address, for Prometheus' `file_sd_configs`. None: no file, as a fixed
    port needs no discovery."""
    advertise_host: str | None = Field(default=None, min_length=1)
    """Name or address of this machine in that file. None: `host`, or the machine's name if `host` is all addresses."""

    @model_validator(mode="after")
    def _check(self) -> PrometheusConfig:
        guarded = self.auth is not None or self.client_cafile is not None
        if not (guarded or self.allow_unauthenticated or is_loopback(self.host)):
            raise ValueError(
                f"host={self.host!r} can be reached from other machines, and nobody would be asked who they are: set "
                "auth (a password or token from a file or variable) or client_cafile (client certificates), use "
                "127.0.0.1, ::1 or localhost, or set allow_unauthenticated=True where the network itself is trusted"
            )
        for name in ("keyfile", "client_cafile"):
            value = getattr(self, name)
            if value is not None and self.certfile is None:
                raise ValueError(f"{name}={str(value)!r} has no effect without certfile: give both or neither")
        if self.ranks == "all" and self.file_sd_dir is None:
            raise ValueError(
                'ranks="all" gives every process of a machine but the first a free port, which Prometheus only '
                'finds through files: set file_sd_dir, or use ranks="local_zero"'
            )
        return self


def is_loopback(host: str) -> bool:
    """Return whether only this machine can connect.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost.example.org")
    (True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name may resolve to anything, and to something else tomorrow
        return False
