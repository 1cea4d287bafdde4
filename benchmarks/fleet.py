"""Measures what a fleet of runs costs a Prometheus: scrapes, rules, memory, and every query of the dashboards.

One small training is recorded. One process then serves many runs, which replay the recording from different places;
every tenth one is collapsed. A Prometheus with the exported configuration, rules and intervals finds them by their
files, as it would find real ones, and is asked at the end what the three dashboards ask.

    python -m benchmarks.fleet [--runs 300] [--seconds 300] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

from benchmarks.report import Result, main
from ess_monitor import Monitor, MonitorConfig
from ess_monitor.alerts import AlertsConfig, export, rule_groups
from ess_monitor.exporters.prometheus.collector import SnapshotCollector
from ess_monitor.featurizers import Backbone, BackboneConfig
from ess_monitor.pipeline.counters import RunCounters
from ess_monitor.records import PHASES, Measurement, RunInfo, Snapshot

DEPTH = 24
STEP_SECONDS = 1.0
STEPS_BETWEEN_SAMPLES = 10
REPLAYS = 10
RUN_NAME = "recorded-run"
SHOWN_HOURS = 6
"""Time range of a dashboard; Grafana divides it into steps of 30 s on a panel of usual width."""
STEP = 30
MAX_CURVES = 20
"""Curves of a panel of the fleet, whatever the number of runs."""


_CPU = "process_cpu_seconds_total"
_GROUPS = [group.name for group in rule_groups(AlertsConfig())]


class Recorder:
    """Keeps what a run exports."""

    name = "recorder"
    inline = True

    def __init__(self) -> None:
        self.run: RunInfo | None = None
        self.measurements: list[Measurement] = []

    def start(self, run: RunInfo, snapshot: Any) -> None:
        self.run = run.model_copy(update={"run_name": RUN_NAME})

    def export(self, measurement: Measurement) -> None:
        self.measurements.append(measurement)

    def close(self, status: str) -> None:
        pass


def record() -> Recorder:
    """Train a small model for some steps and return what was exported."""
    torch.manual_seed(0)
    model: nn.Module = Backbone(BackboneConfig(vocab_size=32, width=16, depth=DEPTH, featurizer="gla", state_size=8))
    optimizer, recorder = torch.optim.AdamW(model.parameters(), lr=1e-3), Recorder()
    config = MonitorConfig(every_n_steps=2, overhead_budget_ratio=None)
    with Monitor(model, config, exporters=[recorder]) as monitor:
        for _ in range(16):
            tokens = torch.randint(0, 32, (2, 33))
            loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step({"loss": loss})
            monitor.flush()
    assert all(reading.status == "ok" for each in recorder.measurements for reading in each.readings)
    return recorder


class Replay:
    """Replays a recording as the counters of one run."""

    def __init__(self, recording: Recorder, number: int) -> None:
        assert recording.run is not None
        self._measurements, self._number = recording.measurements, number
        self._layers = [layer.name for layer in recording.run.layers]
        self._counters = RunCounters(self._layers)
        self._condition = "collapsed" if number == 0 else "healthy"
        self._registry = CollectorRegistry()
        self._registry.register(SnapshotCollector(recording.run, self._snapshot))
        self.body = b""
        """What a scrape shows."""

    def step(self, step: int) -> None:
        """Make one step; some are sampled."""
        self._counters.step(step, STEP_SECONDS)
        if (step + self._number) % STEPS_BETWEEN_SAMPLES == 0:
            count = self._number + step // STEPS_BETWEEN_SAMPLES
            sample = self._measurements[count % len(self._measurements)]
            for phase in PHASES:
                self._counters.spent(phase, 0.002)
            conditions = dict.fromkeys(self._layers, self._condition)
            self._counters.measured("ok", sample.readings, (), conditions)  # type: ignore[arg-type]
        self.body = generate_latest(self._registry)

    def _snapshot(self) -> Snapshot:
        return self._counters.snapshot({"event_log": 0}, {"event_log": 0}, {"event_log": 0})


@contextmanager
def fleet(runs: int, targets: Path) -> Iterator[None]:
    """Serve so many runs, each at a path of its own, and let them train until the end.

    Several runs share one replay and differ in their name, so that the serving process is not what is measured.
    """
    recording = record()
    replays = [Replay(recording, number) for number in range(REPLAYS)]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay, as those of real endpoints could

        def do_GET(self) -> None:
            number = int(self.path.strip("/"))
            body = replays[number % REPLAYS].body.replace(RUN_NAME.encode(), _name(number).encode())
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server, ended = ThreadingHTTPServer(("127.0.0.1", 0), Handler), threading.Event()
    server.daemon_threads = True
    server.handle_error = lambda *arguments: None  # type: ignore[method-assign]  # a scrape that was given up
    targets.mkdir()
    for number in range(runs):
        labels = {"run_id": _name(number), "rank": "0", "instance": f"node:{number}", "__metrics_path__": f"/{number}"}
        entry = [{"targets": [f"127.0.0.1:{server.server_address[1]}"], "labels": labels}]
        (targets / f"{_name(number)}-0.json").write_text(json.dumps(entry))

    def train() -> None:
        step = 0
        while not ended.wait(STEP_SECONDS):
            step += 1
            for replay in replays:
                replay.step(step)

    threads = [threading.Thread(target=work, daemon=True) for work in (server.serve_forever, train)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        server.shutdown()
        server.server_close()


def _name(number: int) -> str:
    return f"run-{number:03d}"


class Server:
    """A Prometheus that runs with the exported configuration."""

    def __init__(self, folder: Path, targets: Path) -> None:
        export(folder / "alerts", condition_for_seconds=60, most_layers_for_seconds=60)  # so that alerts fire soon
        path = folder / "alerts/prometheus/prometheus.example.yml"
        config = yaml.safe_load(path.read_text())
        del config["alerting"]
        config["scrape_configs"][0]["file_sd_configs"][0]["files"] = [f"{targets}/*.json"]
        path.write_text(yaml.safe_dump(config))
        self.dashboards = sorted((folder / "alerts/grafana/dashboards").glob("*.json"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        command = ["prometheus", f"--config.file={path}", f"--storage.tsdb.path={folder}/data"]
        self._log = (folder / "log").open("wb")
        self._process = subprocess.Popen(
            [*command, f"--web.listen-address={self.url[7:]}"], stdout=self._log, stderr=self._log
        )

    def close(self) -> None:
        """Stop it."""
        self._process.terminate()
        self._process.wait(60)
        self._log.close()

    def ask(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer of the HTTP API."""
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}") as response:
            return json.load(response)["data"]

    def has(self, expr: str) -> bool:
        """Return whether a query finds something; False while the server starts."""
        try:
            return bool(self.ask("query", query=expr)["result"])
        except urllib.error.URLError:
            return False

    def own(self) -> dict[str, float]:
        """Return the metrics of the server itself that matter here; those of a rule group by its name."""
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            text = response.read().decode()
        wanted = {"prometheus_tsdb_head_series", "process_resident_memory_bytes", _CPU}
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name in wanted:
                    found[sample.name] = sample.value
                elif sample.name == "prometheus_rule_group_last_duration_seconds":
                    found[sample.labels["rule_group"].partition(";")[2]] = sample.value
                elif sample.name == "prometheus_rule_group_last_evaluation_timestamp_seconds":
                    found[f"{sample.labels['rule_group'].partition(';')[2]} at"] = sample.value
        return found


def queries(dashboard: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Yield what a dashboard asks: the place, the expression, and whether it is of one moment."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield f"{panel['title']} {target['refId']}", target["expr"], target["instant"]
    for mark in dashboard["annotations"]["list"]:
        yield f"mark {mark['name']}", mark["expr"], False


def filled_in(expr: str, dashboard: dict[str, Any], layer: str) -> str:
    """Put in what Grafana would; the fleet shows all runs, the others the first one."""
    values = {
        "$__rate_interval": "1m",
        "$__range": f"{SHOWN_HOURS}h",
        "$job": AlertsConfig().job,
        "$run_id": ".+" if dashboard["uid"].endswith("fleet") else "run-000",
        "$layer": layer,
    }
    return re.sub(r"\$\w+", lambda found: values[found[0]], expr)


def asked(server: Server, layer: str) -> Iterator[dict[str, Any]]:
    """Ask all that the dashboards ask, one after the other."""
    end = time.time()
    start = {"start": f"{end - SHOWN_HOURS * 3600:.3f}", "end": f"{end:.3f}", "step": str(STEP)}
    for path in server.dashboards:
        dashboard = json.loads(path.read_text())
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                found = re.findall(r"^label_values\((.+), (\w+)\)$", variable["query"])
                (series, label) = found[0]
                began = time.perf_counter()
                names = server.ask(f"label/{label}/values", **{"match[]": filled_in(series, dashboard, layer)})
                yield _answer(path, f"variable {variable['name']}", began, len(names), instant=True)
        for place, expr, instant in queries(dashboard):
            expr = filled_in(expr, dashboard, layer)
            began = time.perf_counter()
            if instant:
                result = server.ask("query", query=expr, time=f"{end:.3f}")["result"]
            else:
                result = server.ask("query_range", query=expr, **start)["result"]
            yield _answer(path, place, began, len(result), instant=instant)


def _answer(path: Path, place: str, began: float, series: int, *, instant: bool) -> dict[str, Any]:
    seconds = time.perf_counter() - began
    return {"dashboard": path.stem, "place": place, "seconds": seconds, "series": series, "instant": instant}


class Fleet:
    """One Prometheus and its runs; measured once, reported in two tables."""

    def __init__(self, runs: int, seconds: float) -> None:
        self._runs, self._seconds = runs, seconds
        self._answers: list[dict[str, Any]] = []

    def cost(self) -> Result:
        """Let Prometheus scrape for a while; report what it costs."""
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            folder = Path(name)
            targets = folder / "targets"
            stack.enter_context(fleet(self._runs, targets))
            server = Server(folder, targets)
            stack.callback(server.close)
            job = f'job="{AlertsConfig().job}"'
            deadline = time.monotonic() + 300
            while not server.has(f"count(up{{{job}}} == 1) == {self._runs}"):
                if time.monotonic() > deadline:
                    raise SystemExit(f"not all of {self._runs} targets were up at once within 300 s")
                time.sleep(1)
            before, began = server.own(), time.monotonic()
            groups: dict[str, dict[float, float]] = {group: {} for group in _GROUPS}  # when -> how long
            while time.monotonic() - began < self._seconds:
                time.sleep(5)
                own = server.own()
                for group, evaluations in groups.items():
                    if own[f"{group} at"] != before[f"{group} at"]:
                        evaluations[own[f"{group} at"]] = own[group]
            spent, waited = own[_CPU] - before[_CPU], time.monotonic() - began
            rounds = min(map(len, groups.values()))
            up = [float(each["value"][1]) for each in server.ask("query", query=f"up{{{job}}}")["result"]]
            scrapes, samples = (
                [float(each["value"][1]) for each in server.ask("query", query=f"{metric}{{{job}}}")["result"]]
                for metric in ("scrape_duration_seconds", "scrape_samples_scraped")
            )
            alerts = server.ask("query", query=f'ALERTS{{{job}, alertstate="firing"}}')["result"]
            layers = server.ask("label/layer/values", **{"match[]": f"ess_monitor_layer_condition{{{job}}}"})
            self._answers = list(asked(server, layers[0]))
            own = server.own()
        rows = [
            {"rules": group, "least s": min(seconds), "median s": statistics.median(seconds), "most s": max(seconds)}
            for group, seconds in ((group, sorted(each.values()) or [math.nan]) for group, each in groups.items())
        ]
        memory, failures = own["process_resident_memory_bytes"] / 2**20, []
        seconds_a_round = spent / max(1, rounds)
        if sum(up) != self._runs:
            failures.append(f"{sum(up):.0f} of {self._runs} targets are up")
        return Result(
            f"{self._runs} runs of {DEPTH} layers, {self._seconds:g} s: evaluation of the rules",
            rows,
            [
                f"{sum(up):.0f} of {self._runs} targets up; {sum(samples):.0f} samples a round of scrapes, "
                f"{own['prometheus_tsdb_head_series']:.0f} series in the head, {len(alerts)} alerts firing",
                f"a scrape takes {statistics.median(scrapes):.3f} s (median), {max(scrapes):.3f} s at most",
                f"Prometheus: {memory:.0f} MiB resident; {spent:.1f} s of CPU in {waited:.0f} s for {rounds} rounds of "
                f"rules or more: at most {seconds_a_round:.2f} s a round, scrapes included",
            ],
            failures,
        )

    def dashboards(self) -> Result:
        """Report how long the queries of each dashboard took, and how many series they returned."""
        rows = []
        for name in dict.fromkeys(answer["dashboard"] for answer in self._answers):
            answers = [answer for answer in self._answers if answer["dashboard"] == name]
            slowest, widest = (max(answers, key=lambda each, key=key: each[key]) for key in ("seconds", "series"))
            rows.append(
                {
                    "dashboard": name,
                    "queries": len(answers),
                    "without data": sum(answer["series"] == 0 for answer in answers),
                    "all together, s": sum(answer["seconds"] for answer in answers),
                    "slowest, s": slowest["seconds"],
                    "which": slowest["place"],
                    "most series": widest["series"],
                    "in": widest["place"],
                }
            )
        curves = {
            answer["place"]: answer["series"]
            for answer in self._answers
            if answer["dashboard"].endswith("fleet") and not answer["instant"]
        }
        wide = {place: count for place, count in curves.items() if count > MAX_CURVES and "mark" not in place}
        failures = [f"{place} of the fleet draws {count} curves" for place, count in wide.items()]
        widest = max(count for place, count in curves.items() if "mark" not in place)
        return Result(
            f"The queries of the dashboards over {SHOWN_HOURS} h in steps of {STEP} s, of which the data cover the end",
            rows,
            [
                f"all {len(self._answers)} are answered; a panel of the fleet draws {widest} curves at most",
                "without data: " + "; ".join(dict.fromkeys(x["place"] for x in self._answers if not x["series"])),
            ],
            failures,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=300)
    settings, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    measured = Fleet(settings.runs, settings.seconds)
    sys.exit(main([measured.cost, measured.dashboards], __doc__))
