"""A run in trouble with two ranks, a third one that is gone, and a real Prometheus with the exported files."""

from __future__ import annotations

import json
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ess_monitor.alerts import AlertsConfig, export
from ess_monitor.diagnosis import DiagnosisConfig, thresholds
from ess_monitor.exporters import PrometheusConfig, PrometheusExporter, RunIdentity
from ess_monitor.pipeline.counters import RunCounters
from ess_monitor.records import PHASES, HealthData
from tests.exporters.helpers import action, evidence, finding, free_port, reading, run_info

JOB, RUN_ID = "llm/train", "wla-7"
LAYERS = ("blocks.0.mixer", "blocks.1.mixer", "blocks.2.mixer")
PATIENCE_SECONDS = 25.0
TICK_SECONDS = 0.25

SETTINGS = AlertsConfig(
    job=JOB,
    condition_for_seconds=1,
    condition_keep_firing_seconds=1,
    most_layers_for_seconds=1,
    divergence_for_seconds=1,
    flapping_actions=1,
    ineffective_for_seconds=1,
    overhead_ratio=0.001,
    overhead_for_seconds=1,
    target_down_for_seconds=1,
    samples_per_scrape=1,
)
"""Everything that can fire soon does."""
HEALTH = HealthData(parts_off=("capture",), exporters_off=("tensorboard",), layers_off=LAYERS[:1])
"""What of the monitor is off on both ranks."""


class Server(NamedTuple):
    """A Prometheus that runs."""

    url: str

    def query(self, expression: str, at: float | None = None) -> list[dict[str, Any]]:
        """The instant vector of an expression; an expression that is no PromQL raises with the server's answer."""
        question = {"query": expression} if at is None else {"query": expression, "time": f"{at:.3f}"}
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query?{urllib.parse.urlencode(question)}") as response:
                result: list[dict[str, Any]] = json.load(response)["data"]["result"]
        except urllib.error.HTTPError as error:
            if error.code == 503:
                raise  # starting
            with error:
                raise AssertionError(f"{expression}\n{error.read().decode()}") from None
        return result


def eventually(holds: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if holds():
                return True
        except OSError:
            pass  # not up yet
        time.sleep(0.25)
    return False


@contextmanager
def run_in_trouble(targets: Path) -> Iterator[None]:
    """Two ranks that train on; in every tick something happens to every counter they have."""
    run = run_info(
        LAYERS,
        thresholds=thresholds(DiagnosisConfig(metric="accuracy", metric_solved=0.9)),
        start_timestamp_seconds=time.time() - 60,
    )
    ended = threading.Event()
    with ExitStack() as stack:
        ledgers = [RunCounters(LAYERS) for _ in range(2)]
        sinks = {"event_log": 0, "tensorboard": 0}

        def counted() -> dict[str, int]:
            return dict(sinks)

        for rank, ledger in enumerate(ledgers):
            _tick(ledger, rank, 1)
            config = PrometheusConfig(port=0, ranks="all", file_sd_dir=targets)
            exporter = PrometheusExporter(config, identity=RunIdentity(RUN_ID, rank, rank))
            exporter.start(run, lambda ledger=ledger: ledger.snapshot(counted(), counted(), counted(), HEALTH))  # type: ignore[misc]
            stack.callback(exporter.stop)
        gone = [{"targets": [f"127.0.0.1:{free_port()}"], "labels": {"run_id": RUN_ID, "rank": "2"}}]
        (targets / f"{RUN_ID}-2.json").write_text(json.dumps(gone))

        def train() -> None:
            step = 1
            while not ended.wait(TICK_SECONDS):
                step += 1
                for rank, ledger in enumerate(ledgers):
                    _tick(ledger, rank, step)
                for sink in sinks:
                    sinks[sink] += 1

        thread = threading.Thread(target=train, daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(ended.set)
        yield


def _tick(ledger: RunCounters, rank: int, step: int) -> None:
    ledger.step(step, TICK_SECONDS)
    for phase in PHASES:
        ledger.spent(phase, 0.01)
    ledger.overhead(0.02, 100)
    used = 0.125 + 0.5 * rank
    sizes: dict[str, Any] = {"effective_size": 16 * used, "utilization_ratio": used, "retention_ratio": 0.5}
    good = [reading(layer, step, modulation_ratio=((0.1, 0.25),), **sizes) for layer in LAYERS]
    conditions = {LAYERS[0]: "collapsed", LAYERS[1]: "collapsed", LAYERS[2]: "saturated"}
    found = {LAYERS[0]: evidence(LAYERS[0], step)}
    ledger.measured("ok", good, [finding(LAYERS[0], step)], conditions, found)  # type: ignore[arg-type]
    broken = [reading(layer, step, status="nonfinite") for layer in LAYERS]
    ledger.measured("failed", broken)
    acts = [action(step=step), action(step=step, action="rescale_alpha", outcome="failed")]
    ledger.autopilot(acts, ("pull_to_identity",), budget=3, enabled=True)


@contextmanager
def prometheus(folder: Path, targets: Path) -> Iterator[Server]:
    """Started on the exported example, with short intervals and without Alertmanager."""
    export(folder / "alerts", SETTINGS)
    path = folder / "alerts/prometheus/prometheus.example.yml"
    config = yaml.safe_load(path.read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    del config["alerting"]
    (scrape,) = config["scrape_configs"]
    scrape["file_sd_configs"] = [{"files": [f"{targets}/*.json"], "refresh_interval": "1s"}]
    path.write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={path}", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={url[7:]}"], stdout=log, stderr=log)
        try:
            server = Server(url)
            assert eventually(lambda: len(server.query("up")) == 3), (folder / "log").read_text()
            yield server
        finally:
            process.terminate()
            process.wait(30)
