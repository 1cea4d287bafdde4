"""Answers requests: `/metrics` for authorized readers, `/-/healthy` for everybody, and nothing else."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING

from ess_monitor.errors import format_error
from ess_monitor.exporters.prometheus.auth import Authenticator
from ess_monitor.exporters.prometheus.http.request import Request, Response, text_response

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

logger = logging.getLogger("ess_monitor.exporters")

METRICS_PATH = "/metrics"
HEALTH_PATH = "/-/healthy"


class Pages:
    """Handles the requests to the endpoint.

    `/-/healthy` needs no credentials: the probes of a cluster cannot send any, and "ok" reveals nothing about the run.
    Where client certificates are required, they are required for `/-/healthy` too.

    Args:
        registry: what `/metrics` shows.
        authenticator: returns what checks who may see it; None: everybody who can connect.
    """

    def __init__(self, registry: CollectorRegistry, authenticator: Callable[[], Authenticator] | None = None) -> None:
        self._registry = registry
        self._authenticator = authenticator
        self._has_logged_error = False

    def respond(self, request: Request) -> Response:
        """Return the response to a request. Raises what the registry raises."""
        if request.path not in (METRICS_PATH, HEALTH_PATH):
            return text_response(HTTPStatus.NOT_FOUND, f"not found; there are {METRICS_PATH} and {HEALTH_PATH}")
        if request.method not in ("GET", "HEAD"):
            return text_response(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD", {"Allow": "GET, HEAD"})
        if request.path == HEALTH_PATH:
            return text_response(HTTPStatus.OK, "ok")
        authenticator = None if self._authenticator is None else self._authenticator()
        if authenticator is not None and not authenticator.admits(request.headers):
            return text_response(HTTPStatus.UNAUTHORIZED, "credentials are needed", authenticator.challenge)
        try:
            return self._metrics(request)
        except Exception as error:
            if not self._has_logged_error:
                self._has_logged_error = True
                logger.warning(
                    "exporter 'prometheus' answers scrapes with status 500: %s. The training goes on; further errors "
                    "of this kind are not logged.",
                    format_error(error),
                )
            raise

    def _metrics(self, request: Request) -> Response:
        from prometheus_client.exposition import gzip_accepted

        accept = request.headers.get("accept", "")
        try:
            body, content_type = self._encoded(accept)
        except Exception:
            if not accept:
                raise
            body, content_type = self._encoded("")  # one that cannot be parsed is answered like none
        headers = {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"}
        if gzip_accepted(request.headers.get("accept-encoding", "")):
            body = gzip.compress(body, compresslevel=1)  # text this repetitive shrinks tenfold at the cheapest level
            headers["Content-Encoding"] = "gzip"
        return Response(HTTPStatus.OK, body, headers)

    def _encoded(self, accept: str) -> tuple[bytes, str]:
        from prometheus_client.exposition import choose_encoder

        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
