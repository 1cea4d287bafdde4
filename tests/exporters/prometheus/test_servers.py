"""A real Prometheus scrapes the endpoint: with and without credentials, over TLS, and found through files."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from ess_monitor.exporters import PrometheusConfig, PrometheusExporter, RunIdentity
from tests.exporters.conftest import Certificate
from tests.exporters.helpers import free_port, run_info, snapshot

pytestmark = pytest.mark.servers

PATIENCE_SECONDS = 60.0
SECRET = "correct-horse-battery"


class Scene(NamedTuple):
    """A Prometheus that has scraped everything once, and the two ranks it found through files."""

    url: str
    ranks: list[PrometheusExporter]
    folder: Path

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector of an expression."""
        question = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{question}", timeout=PATIENCE_SECONDS) as response:
            result: list[dict[str, Any]] = json.load(response)["data"]["result"]
        return result

    def up(self) -> dict[tuple[str, str], str]:
        """(job, rank) -> value of `up`."""
        return {
            (series["metric"]["job"], series["metric"].get("rank", "")): series["value"][1]
            for series in self.query("up")
        }


def _eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            if holds():
                return True
        except OSError:
            pass  # not up yet
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def scene(
    tmp_path_factory: pytest.TempPathFactory, certificate: Certificate, client_certificate: Certificate
) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("prometheus")
    secret, wrong, targets = folder / "secret", folder / "wrong", folder / "targets"
    secret.write_text(SECRET)
    wrong.write_text(SECRET + "x")
    tls = certificate._asdict()
    with ExitStack() as stack:

        def serve(identity: RunIdentity | None = None, **settings: Any) -> PrometheusExporter:
            exporter = PrometheusExporter(PrometheusConfig(port=0, **settings), identity=identity)
            exporter.start(run_info(), lambda: snapshot())
            stack.callback(exporter.stop)
            return exporter

        password = serve(auth={"username": "prometheus", "secret_file": secret}, **tls)
        token = serve(auth={"secret_file": secret})
        mutual = serve(client_cafile=client_certificate.certfile, **tls)
        discovered = {"file_sd_dir": targets, "ranks": "all", "linger_seconds": 600}
        ranks = [serve(RunIdentity("wla-7", rank, rank), **discovered) for rank in (0, 1)]

        ca = {"ca_file": str(certificate.certfile)}
        keys = {"cert_file": str(client_certificate.certfile), "key_file": str(client_certificate.keyfile)}

        def job(name: str, exporter: PrometheusExporter, **settings: Any) -> dict[str, Any]:
            assert exporter.url is not None
            scheme, _, rest = exporter.url.partition("://")
            static = [{"targets": [rest.removesuffix("/metrics")]}]
            return {"job_name": name, "scheme": scheme, "static_configs": static, **settings}

        def user(file: Path) -> dict[str, str]:
            return {"username": "prometheus", "password_file": str(file)}

        jobs = [
            job("password", password, tls_config=ca, basic_auth=user(secret)),
            job("no password", password, tls_config=ca),
            job("wrong password", password, tls_config=ca, basic_auth=user(wrong)),
            job("unknown authority", password, basic_auth=user(secret)),
            job("token", token, authorization={"credentials_file": str(secret)}),
            job("no token", token),
            job("client certificate", mutual, tls_config={**ca, **keys}),
            job("no client certificate", mutual, tls_config=ca),
            {
                "job_name": "ess_monitor",
                "file_sd_configs": [{"files": [f"{targets}/*.json"], "refresh_interval": "1s"}],
            },
        ]
        config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": jobs}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        url = f"http://127.0.0.1:{free_port()}"
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        log = stack.enter_context((folder / "log").open("wb"))
        process = subprocess.Popen([*command, f"--web.listen-address={url[7:]}"], stdout=log, stderr=log)
        stack.callback(process.wait, PATIENCE_SECONDS)
        stack.callback(process.terminate)
        scene = Scene(url, ranks, targets)
        assert _eventually(lambda: len(scene.up()) == len(jobs) + 1), (folder / "log").read_text()
        yield scene


def test_only_scrapes_with_the_right_credentials_succeed(scene: Scene) -> None:
    expected = {
        "password": "1",
        "no password": "0",
        "wrong password": "0",
        "unknown authority": "0",
        "token": "1",
        "no token": "0",
        "client certificate": "1",
        "no client certificate": "0",
    }

    def seen() -> dict[str, str]:
        return {job: value for (job, _), value in scene.up().items() if job in expected}

    assert _eventually(lambda: seen() == expected), seen()
    scraped = {series["metric"]["job"] for series in scene.query("ess_monitor_layers")}
    assert scraped == {"password", "token", "client certificate", "ess_monitor"}


def test_two_ranks_are_found_through_files_labeled_and_seen_to_their_end(scene: Scene) -> None:
    assert _eventually(
        lambda: (
            {place: value for place, value in scene.up().items() if place[0] == "ess_monitor"}
            == {("ess_monitor", "0"): "1", ("ess_monitor", "1"): "1"}
        )
    )
    series = scene.query('ess_monitor_layers{job="ess_monitor"}')
    assert {(found["metric"]["run_id"], found["metric"]["rank"]) for found in series} == {
        ("wla-7", "0"),
        ("wla-7", "1"),
    }

    scene.ranks[0].close("finished")
    finished = 'ess_monitor_run_status{job="ess_monitor", status="finished"} == 1'
    assert _eventually(lambda: [found["metric"]["rank"] for found in scene.query(finished)] == ["0"])

    scene.ranks[1].stop()
    assert [path.name for path in scene.folder.iterdir()] == ["wla-7-0.json"]
    # Out of discovery its series end at once, instead of being down for as long as somebody asks.
    assert _eventually(lambda: ("ess_monitor", "1") not in scene.up())
    assert scene.up()["ess_monitor", "0"] == "1"
