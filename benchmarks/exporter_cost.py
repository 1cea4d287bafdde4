"""Measures the cost of the Prometheus endpoint: series, bytes and time of a scrape, and its effect on a training step.

A thread of the training process answers each scrape, so the training waits for the interpreter's lock. Whole runs, and
even long parts of one run, differ by more than this cost. Therefore another process scrapes during every second step of
one run, and each of these steps is compared with the neighboring step without a scrape.
"""

from __future__ import annotations

import contextlib
import gzip
import statistics
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch
from torch import nn

from benchmarks.report import Result, main
from ess_monitor import Monitor, MonitorConfig
from ess_monitor.exporters import PrometheusConfig, PrometheusExporter
from ess_monitor.featurizers import Backbone, BackboneConfig

DEPTHS = (2, 12, 48)
MAX_SERIES_PER_LAYER = 12
"""2 sizes, 3 ratios, 6 conditions, 1 count of non-finite states. Several measuring ranks would add 2, and evidence up
to 3; here only one rank measures, and nothing is examined."""
MAX_OTHER_SERIES = 182
"""103 of histograms (19 of a step, 14 of each of 6 phases), 21 outcomes of actions, 16 of the monitor's parts, 10 of
conditions, 4 of one exporter and 26 single ones make 180. The limit is 2 higher, so that a new label exceeds it."""
SCRAPES = 50
PAIRS = 60
INTERVAL_SECONDS = 15
"""Time between two scrapes, as in the example configuration."""
MAX_SHARE = 0.001
"""Share of one processor: a tenth of the default overhead budget."""
ACCEPT = {"Accept": "application/openmetrics-text;version=1.0.0", "Accept-Encoding": "gzip"}
"""Request headers of Prometheus."""


class Training:
    """Trains a small GLA with a monitor that has an endpoint."""

    def __init__(self, depth: int) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = Backbone(
            BackboneConfig(vocab_size=64, width=32, depth=depth, featurizer="gla", state_size=16)
        )
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self._tokens = torch.randint(0, 64, (4, 33))

    def step(self, monitor: Monitor) -> float:
        """Run one training step; return its seconds."""
        started = time.perf_counter()
        logits = self.model(self._tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), self._tokens[:, 1:].flatten())
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        monitor.step({"loss": loss})
        return time.perf_counter() - started


@contextmanager
def training(depth: int) -> Iterator[tuple[Training, Monitor, str]]:
    """Start a run and measure it once, so that every series exists. It is not measured again."""
    run, exporter = Training(depth), PrometheusExporter(PrometheusConfig(port=0))
    config = MonitorConfig(every_n_steps=1_000_000, overhead_budget_ratio=None)
    with Monitor(run.model, config, exporters=[exporter]) as monitor:
        for _ in range(3):
            run.step(monitor)
        monitor.flush()
        assert len(monitor.readings) == depth, "a layer has no reading, so its series are missing"
        assert exporter.url is not None
        yield run, monitor, exporter.url


def scrape(url: str, headers: dict[str, str] = ACCEPT) -> bytes:
    """Return the response body as it was sent."""
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as response:
        body: bytes = response.read()
    return body


def size() -> Result:
    """Measure series, bytes and time of a scrape while nothing else runs."""
    rows = []
    for depth in DEPTHS:
        with training(depth) as (_, _, url), scraper(url) as requests:
            seconds, spent = [], time.process_time()
            for _ in range(SCRAPES):
                started = time.perf_counter()
                requests.send(None)
                requests.recv()
                seconds.append(time.perf_counter() - started)
            spent = time.process_time() - spent
            sent = scrape(url)
        text = gzip.decompress(sent)
        series = sum(not line.startswith(b"#") for line in text.splitlines())
        rows.append(
            {
                "layers": depth,
                "series": series,
                "bytes": len(text),
                "bytes sent (gzip)": len(sent),
                "CPU ms": 1e3 * spent / SCRAPES,
                "median ms": 1e3 * statistics.median(seconds),
                "95th percentile ms": 1e3 * statistics.quantiles(seconds, n=20)[-1],
            }
        )
    few, many = rows[0], rows[-1]
    a_layer = (many["series"] - few["series"]) / (many["layers"] - few["layers"])
    others = many["series"] - a_layer * many["layers"]
    share = many["CPU ms"] / 1e3 / INTERVAL_SECONDS
    failures = []
    if a_layer > MAX_SERIES_PER_LAYER or others > MAX_OTHER_SERIES:
        failures.append(
            f"{a_layer:g} series per layer and {others:g} others, target at most {MAX_SERIES_PER_LAYER} and "
            f"{MAX_OTHER_SERIES}"
        )
    if share > MAX_SHARE:
        failures.append(f"{share:.2%} of one processor, target at most {MAX_SHARE:.1%}")
    return Result(
        f"One scrape, over loopback, {SCRAPES} times; CPU time of the training process",
        rows,
        [
            f"{a_layer:g} series per layer and {others:g} others; "
            f"at one scrape in {INTERVAL_SECONDS} s {many['layers']} layers take {share:.3%} of one processor"
        ],
        failures,
    )


def _scraper(url: str, requests: Connection) -> None:
    """Scrape once for each message, until the other side closes."""
    with contextlib.suppress(EOFError):
        while True:
            requests.send(len(scrape(url)))
            requests.recv()


@contextmanager
def scraper(url: str) -> Iterator[Connection]:
    """Start a process that scrapes once for each message, and answers after the scrape."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_scraper, args=(url, theirs), daemon=True)
    process.start()
    theirs.close()
    ours.recv()  # it has started, and scraped once
    try:
        yield ours
    finally:
        ours.close()
        process.join(60)


def run() -> Result:
    """Time steps with a scrape, each against the neighboring step without one."""
    rows = []
    for depth in DEPTHS:
        quiet: list[float] = []
        scraped: list[float] = []
        with training(depth) as (loop, monitor, url), scraper(url) as requests:
            for pair in range(PAIRS):
                for is_scraped in (False, True) if pair % 2 else (True, False):
                    if is_scraped:
                        requests.send(None)
                    (scraped if is_scraped else quiet).append(loop.step(monitor))
                    if is_scraped:
                        requests.recv()  # the next step is quiet
        added = [1e3 * (b - a) for a, b in zip(quiet, scraped, strict=True)]
        low, middle, high = statistics.quantiles(added, n=4)
        rows.append(
            {
                "layers": depth,
                "quiet, median ms": 1e3 * statistics.median(quiet),
                "scraped, median ms": 1e3 * statistics.median(scraped),
                "median ratio": statistics.median(b / a for a, b in zip(quiet, scraped, strict=True)),
                "a scrape adds, median ms": middle,
                "quartiles": f"{low:.2f} to {high:.2f}",
            }
        )
    return Result(
        f"A training step while a scrape is answered, against its quiet neighbor, {PAIRS} pairs",
        rows,
        ["no target: neighboring steps on a busy machine differ by more than a scrape; the CPU time above has one"],
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main([size, run], __doc__))
