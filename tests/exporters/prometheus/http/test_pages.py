"""What the endpoint answers to headers that cannot be parsed."""

from __future__ import annotations

import pytest

from ess_monitor.exporters import PrometheusConfig, PrometheusExporter
from tests.exporters.helpers import run_info, snapshot
from tests.exporters.prometheus.scraping import ask


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text;version=latest",
        'application/openmetrics-text;version="1.0.0"',
        "application/openmetrics-text;version=1.0.x",
        "text/plain;version=..",
        "\xff;=,;,",
    ],
)
def test_an_accept_header_that_cannot_be_parsed_is_answered_like_none(accept: str) -> None:
    exporter = PrometheusExporter(PrometheusConfig(port=0))
    exporter.start(run_info(), lambda: snapshot())
    _, plain_headers, plain = ask(exporter.url)
    status, headers, body = ask(exporter.url, Accept=accept)
    exporter.close("finished")
    assert (status, body) == (200, plain)
    assert headers["Content-Type"].startswith(plain_headers["Content-Type"])
