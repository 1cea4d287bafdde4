"""Runs the jobs that have no result yet, on Ray, in a pool of processes or in a plain loop, and keeps each result.

A job is a run and a variant. Its result is one line of JSON, appended to the file of results when the job ends. A job
is done if the file has a line with its settings and, in mode auto, the present thresholds; failed jobs are repeated.
What the results so far ask for (`benchmarks.trust.plan`) is run in rounds, until they ask for nothing.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.trust.plan import is_treated, missing
from benchmarks.trust.settings import VARIANTS, TrustRun

EXAMPLES = Path(__file__).parents[2] / "examples"

Job = dict[str, Any]
"""{"name": name of the run, "variant": variant}."""
JobResult = dict[str, Any]
Work = Callable[[Job], JobResult]


def work(job: Job) -> JobResult:
    """Train the run and variant of a job, in a worker."""
    from benchmarks.trust.catalog import CATALOG
    from benchmarks.trust.training import train

    return train(next(run for run in CATALOG if run.name == job["name"]), job["variant"])


def run_missing(
    runs: Iterable[TrustRun], out: Path, *, workers: int | None = None, work: Work = work
) -> tuple[int, int]:
    """Run the jobs that are needed, append the results to `out`, and return how many were run and how many failed."""
    runs, done, failed = tuple(runs), 0, 0
    out.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with open(out, "a+b") as file, Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        _end_line(file)
        while not failed and (jobs := [{"name": n, "variant": v} for n, v in missing(runs, read_results(out))]):
            bar = progress.add_task("training", total=len(jobs))
            for result in _results(work, jobs, workers):
                file.write(json.dumps(result).encode() + b"\n")
                file.flush()
                done += 1
                failed += "error" in result
                progress.print(summary(result), highlight=False, soft_wrap=True)
                progress.advance(bar)
    return done, failed


def read_results(path: Path) -> list[JobResult]:
    """Return the last result of every job in a file of results, plain or gzipped; none if there is no file.

    A line that an interruption cut off is left out.
    """
    if not path.exists():
        return []
    raw = path.read_bytes()
    content = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    results: dict[tuple[str, str], JobResult] = {}
    for line in content.splitlines():
        try:
            result = json.loads(line)
        except ValueError:
            continue
        key = result["name"], result["variant"]
        if "error" not in result or key not in results:
            results.pop(key, None)
            results[key] = result
    return list(results.values())


def record(runs: Sequence[TrustRun], results: Iterable[JobResult], path: Path) -> int:
    """Write the results of these runs, gzipped and in the order of the catalog; return how many there are."""
    order = {(run.name, variant): k for k, (run, variant) in enumerate((r, v) for r in runs for v in VARIANTS)}
    kept = [result for result in results if "error" not in result and (result["name"], result["variant"]) in order]
    kept.sort(key=lambda result: order[result["name"], result["variant"]])
    path.write_bytes(gzip.compress("".join(json.dumps(result) + "\n" for result in kept).encode(), mtime=0))
    return len(kept)


def summary(result: JobResult) -> str:
    """Return one line about a result."""
    title = f"{result['name']} [{result['variant']}]".replace("[", r"\[")
    if "error" in result:
        return f"{title}: {result['error']}"
    loss = "not finite" if result["loss"] is None else f"{result['loss']:.4f}"
    found = sum(finding["condition"] == "collapsed" for finding in result["findings"])
    treated = ", treated" if is_treated(result) else ""
    seconds = f"{result['seconds']:.0f} s"
    return f"{title}: loss {loss}, accuracy {result['accuracy']:.3f}, {found} collapsed{treated}, {seconds}"


def _results(work: Work, jobs: list[Job], workers: int | None) -> Iterator[JobResult]:
    """Yield the result of each job, in the order in which they end. A job that raises has a result with its error."""
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            try:
                yield work(job)
            except Exception as error:
                yield _failed(job, error)
    elif find_spec("ray") is not None:
        yield from _results_of_ray(work, jobs, workers)
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(work, job): job for job in jobs}
            for future in as_completed(futures):
                raised = future.exception()
                yield future.result() if raised is None else _failed(futures[future], raised)


def _results_of_ray(work: Work, jobs: list[Job], workers: int | None) -> Iterator[JobResult]:
    sys.path.insert(0, str(EXAMPLES))
    from sweep import ray, results  # the sweep tells Ray to send no usage data before it imports it

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield from results(work, jobs)
    finally:
        ray.shutdown()


def _failed(job: Job, error: BaseException) -> JobResult:
    return {**job, "error": f"{type(error).__name__}: {error}".splitlines()[0]}


def _end_line(file: Any) -> None:
    """End the last line, which an interruption may have cut off."""
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
