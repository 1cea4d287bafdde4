"""Runs each item in a process of its own, with limited processor time and memory, and keeps the outcomes in a file."""

from __future__ import annotations

import json
import os
import resource
import signal
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.census.item import Item, Outcome, examine

_BYTES = 12 << 30


def run(items: Iterable[Item], path: Path, *, limit_seconds: int) -> Iterator[Outcome]:
    """Yield the outcome of each item; those that `path` already holds are read from it.

    The processes are forked, so that libraries are imported once. One that ends without an outcome (a limit, a crash of
    the interpreter) is an outcome as well.
    """
    known = {(o.source, o.name): o for o in recorded(path)}
    for item in items:
        outcome = known.get((item.source, item.name))
        if outcome is None:
            before = _seconds_of_children()
            outcome = _forked(item, limit_seconds)
            outcome.seconds = round(_seconds_of_children() - before, 2)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
        yield outcome


def recorded(path: Path) -> list[Outcome]:
    """Return the outcomes that a file holds."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Outcome(**json.loads(line)) for line in lines]


def _forked(item: Item, limit_seconds: int) -> Outcome:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
            resource.setrlimit(resource.RLIMIT_CPU, (limit_seconds, limit_seconds + 1))
            signal.alarm(30 * limit_seconds)  # for one that waits
            torch.set_num_threads(1)
            warnings.simplefilter("ignore")
            data = json.dumps(asdict(examine(item))).encode()
            with os.fdopen(writing, "wb") as file:
                file.write(data)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        data = file.read()
    _, status = os.waitpid(child, 0)
    if data:
        return Outcome(**json.loads(data))
    is_late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGXCPU)
    return Outcome(item.source, item.name, problem="longer than the limit" if is_late else "the process ended")


def _seconds_of_children() -> float:
    """Return the processor time of all items so far, which other programs do not change."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
