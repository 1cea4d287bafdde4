"""Runs a long training with small steps, of which the monitor samples a few, and the same training without a monitor.

    python -m tests.faults.soak [--steps 100000] [--json FILE]

Prints the resources of the process at the start, in the middle and at the end. Ends with status 1 if one of them grew
beyond its limit between the middle and the end, or if losses or parameters of the two trainings differ in a bit.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import os
import struct
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.table import Table

from ess_monitor import Monitor, MonitorConfig
from ess_monitor.exporters import EventLogConfig, EventLogExporter, PrometheusConfig, PrometheusExporter
from tests.exporters.prometheus.scraping import ask
from tests.faults.harness import (
    SETTINGS,
    Injection,
    Outcome,
    backbone,
    batches,
    case,
    hooks_of,
    loss_of,
    state_bytes,
)

SHORT = 4_000
"""Steps of the short run that is a case of the table."""
MAX_LOG_BYTES = 65_536
"""Limit of the event log, and of its rotated file."""
LIMITS = {"resident_bytes": 16 * 2**20, "blocks": 2_000, "threads": 0, "file_handles": 0}
"""Permitted growth from the middle to the end. A list of the steps, or of the samples with their readings, would take
more than 2,000 of Python's blocks."""


@dataclass(frozen=True)
class Figures:
    """Resources of the process at one step."""

    step: int
    resident_bytes: int
    blocks: int
    """Blocks of Python's allocator."""
    threads: int
    file_handles: int
    log_bytes: int
    """Size of the log's largest file so far."""

    @classmethod
    def of_now(cls, step: int, log_bytes: int) -> Figures:
        gc.collect()
        proc = Path("/proc/self")
        there = proc.exists()
        return cls(
            step,
            int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if there else 0,
            sys.getallocatedblocks(),
            threading.active_count(),
            len(os.listdir(proc / "fd")) if there else 0,
            log_bytes,
        )


@dataclass(frozen=True)
class Report:
    """The result of a long run."""

    start: Figures
    middle: Figures
    end: Figures
    samples: int
    measured: int
    """Samples that were measured."""
    scrapes: int
    seconds: float
    unchanged: bool
    """Losses and parameters are those of the training without the monitor, bit for bit; the model has no hooks left."""

    @property
    def problems(self) -> list[str]:
        """Describe every limit that was exceeded."""
        growth = {name: getattr(self.end, name) - getattr(self.middle, name) for name in LIMITS}
        found = [f"{name} grew by {more}" for name, more in growth.items() if more > LIMITS[name]]
        if self.end.log_bytes > MAX_LOG_BYTES:
            found.append(f"a file of the log has {self.end.log_bytes} bytes")
        if self.measured < self.samples:
            found.append(f"{self.measured} of {self.samples} samples were measured")
        return found if self.unchanged else [*found, "the training was changed"]


class Training:
    """Trains a regression at every step, and the sampled model only at the steps of its samples.

    The data come from torch's global generator, so that a monitor which draws from it changes them.
    """

    def __init__(self) -> None:
        self.model = backbone()
        self._weight = torch.zeros(4, requires_grad=True)
        self._tokens = batches(1)[0]
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2)
        self._seen = hashlib.sha256()
        torch.manual_seed(2)

    def step(self, *, whole: bool) -> float:
        """Train the regression and, in a `whole` step, also the model; return the loss."""
        loss = (torch.randn(4).dot(self._weight) - 1).square()  # it never converges, so each draw changes the result
        if whole:
            loss = loss + loss_of(self.model, self._tokens)
        loss.backward()
        with torch.no_grad():  # without an optimizer, which takes three times as long as the rest of the step
            self._weight.sub_(cast(torch.Tensor, self._weight.grad), alpha=1e-2)
        self._weight.grad = None
        if whole:
            self._optimizer.step()
            self._optimizer.zero_grad()
        value = loss.item()
        self._seen.update(struct.pack("d", value))
        return value

    def digest(self) -> str:
        """Return a hash of all losses so far and the current parameters."""
        seen = self._seen.copy()
        seen.update(self._weight.detach().numpy().tobytes())
        seen.update(state_bytes(self.model))
        return seen.hexdigest()


def run(folder: Path, steps: int) -> Report:
    """Run both trainings, with a sample every 100 steps of a long run and a scrape at every tenth sample."""
    every = max(20, steps // 1000)
    path, training, began, scrapes, largest = folder / "events.jsonl", Training(), time.monotonic(), 0, 0
    endpoint = PrometheusExporter(PrometheusConfig(port=0))
    sinks = [EventLogExporter(EventLogConfig(path=path, max_bytes=MAX_LOG_BYTES)), endpoint]
    config = MonitorConfig.load(environment=False, **{**SETTINGS, "every_n_steps": every})
    marks = {steps // 10: None, steps // 2: None, steps: None}
    whole = bytearray(steps + 1)  # the sampled steps, in memory of fixed size
    figures: list[Figures] = []
    with Monitor(training.model, config, exporters=sinks) as monitor:
        for step in range(1, steps + 1):
            whole[step] = monitor.armed
            monitor.step({"loss": training.step(whole=bool(whole[step]))})
            if step % every == 1:
                monitor.flush()
                largest = max(largest, _largest(folder))
            if step % (10 * every) == 1:
                scrapes += ask(endpoint.url).status == 200
            if step in marks:
                monitor.flush()
                figures.append(Figures.of_now(step, largest))
        counts = monitor.snapshot().measurements_total
    bare = Training()
    for step in range(1, steps + 1):
        bare.step(whole=bool(whole[step]))
    unchanged = training.digest() == bare.digest() and not hooks_of(training.model)
    seconds = time.monotonic() - began
    return Report(*figures, sum(counts.values()), counts["ok"], scrapes, seconds, unchanged)  # type: ignore[misc]


def _largest(folder: Path) -> int:
    sizes = [0]
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # just renamed by the log's own thread
            sizes.append(file.stat().st_size)
    return max(sizes)


@case(f"{SHORT} steps in a row, with an event log of at most {MAX_LOG_BYTES} bytes and a scraped endpoint")
def soak(injection: Injection) -> Outcome:
    report = run(injection.folder, SHORT)
    end, middle = report.end, report.middle
    return Outcome(
        report.unchanged,
        {
            f"all {report.samples} samples ok, {report.scrapes} scrapes": report.measured
            == report.samples
            == SHORT // 20
            and report.scrapes == SHORT // 200,
            f"nothing grew ({end.blocks - middle.blocks:+} blocks, {end.threads} threads, {end.file_handles} handles, "
            f"log {end.log_bytes} bytes)": not report.problems,
        },
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the figures of a long run; return 1 if a limit was exceeded."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report = run(Path(folder), options.steps)
    table = Table(title=f"{options.steps:,} steps, {report.samples} samples, {report.seconds:.0f} s")
    for column in ("", "start", "middle", "end", "may grow by"):
        table.add_column(column, justify="right" if column else "left")
    moments = (report.start, report.middle, report.end)
    table.add_row("step", *(f"{moment.step:,}" for moment in moments), "")
    for name in (*LIMITS, "log_bytes"):
        limit = f"{LIMITS[name]:,}" if name in LIMITS else f"at most {MAX_LOG_BYTES:,}"
        table.add_row(name.replace("_", " "), *(f"{getattr(moment, name):,}" for moment in moments), limit)
    Console().print(table, *(f"[red]{problem}" for problem in report.problems), sep="\n")
    if options.json is not None:
        options.json.write_text(json.dumps({**asdict(report), "problems": report.problems}, indent=2) + "\n")
    return 1 if report.problems else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
