"""A long run: steps that do nothing but tell the monitor, which samples a forward pass now and then.

    python -m tests.faults.soak [--steps 100000] [--json FILE]

Prints what the process holds at the start, in the middle and at the end, and ends with 1 when something grew beyond its
limit between the middle and the end.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ess_monitor import Monitor, MonitorConfig
from ess_monitor.exporters import EventLogConfig, EventLogExporter, PrometheusConfig, PrometheusExporter
from tests.exporters.scraping import ask
from tests.faults.harness import SETTINGS, Injection, Outcome, backbone, batches, case, hooks_of, state_bytes

SHORT = 4_000
"""Steps of the case in the table."""
MAX_LOG_BYTES = 65_536
"""Of the event log and of its rotated part, each."""
LIMITS = {"resident_bytes": 16 * 2**20, "blocks": 2_000, "threads": 0, "file_handles": 0}
"""What may be there more at the end than in the middle. 2,000 of Python's blocks are less than a list of the steps, or
of the samples with their readings, would take."""


@dataclass(frozen=True)
class Figures:
    """What the process holds."""

    step: int
    resident_bytes: int
    blocks: int
    """Of Python's allocator."""
    threads: int
    file_handles: int
    log_bytes: int
    """Largest of the log's files so far."""

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
    """How a long run went."""

    start: Figures
    middle: Figures
    end: Figures
    samples: int
    measured: int
    """Samples that were measured."""
    scrapes: int
    seconds: float
    unchanged: bool
    """The model is what it was, and nothing hangs on it."""

    @property
    def problems(self) -> list[str]:
        """What went beyond its limit."""
        growth = {name: getattr(self.end, name) - getattr(self.middle, name) for name in LIMITS}
        found = [f"{name} grew by {more}" for name, more in growth.items() if more > LIMITS[name]]
        if self.end.log_bytes > MAX_LOG_BYTES:
            found.append(f"a file of the log has {self.end.log_bytes} bytes")
        if self.measured < self.samples:
            found.append(f"{self.measured} of {self.samples} samples were measured")
        return found if self.unchanged else [*found, "the model was changed"]


def run(folder: Path, steps: int) -> Report:
    """Take so many steps, a sample every 100 of a long run, and a scrape with every tenth sample."""
    every = max(20, steps // 1000)
    path, model, (tokens, *_) = folder / "events.jsonl", backbone(), batches(1)
    before, began, scrapes, largest = state_bytes(model), time.monotonic(), 0, 0
    endpoint = PrometheusExporter(PrometheusConfig(port=0))
    sinks = [EventLogExporter(EventLogConfig(path=path, max_bytes=MAX_LOG_BYTES)), endpoint]
    config = MonitorConfig.load(environment=False, **{**SETTINGS, "every_n_steps": every})
    marks = {steps // 10: None, steps // 2: None, steps: None}
    figures: list[Figures] = []
    with Monitor(model, config, exporters=sinks) as monitor:
        for step in range(1, steps + 1):
            if monitor.armed:
                model(tokens)
            monitor.step({"loss": 1.0})
            if step % every == 1:
                monitor.flush()
                largest = max(largest, _largest(folder))
            if step % (10 * every) == 1:
                scrapes += ask(endpoint.url).status == 200
            if step in marks:
                monitor.flush()
                figures.append(Figures.of_now(step, largest))
        counts = monitor.snapshot().measurements_total
    unchanged = state_bytes(model) == before and not hooks_of(model)
    seconds = time.monotonic() - began
    return Report(*figures, sum(counts.values()), counts["ok"], scrapes, seconds, unchanged)  # type: ignore[misc]


def _largest(folder: Path) -> int:
    sizes = [0]
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # renamed in this moment, by the log's own thread
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
    """Print the figures of a long run; 1 when something grew."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--json", type=Path, help="write the figures there too")
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
