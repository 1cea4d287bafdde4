"""Measures how much the computation of a sample slows the training down: in the worker's thread, and in a process.

    python -m benchmarks.worker [--json FILE]

A thread shares the interpreter's lock with the training, a process does not; both share the cores and the memory. The
training is small and bound by Python, where the lock matters most. Blocks of steps alternate: nothing beside them, a
thread that measures the same operators over and over, a process that does. Seconds are wall time; on a machine with
other load the two are compared with each other, and not with the bare step.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
from torch import multiprocessing

from benchmarks.layer_overhead import MODELS, Training, quiet
from benchmarks.report import Result, main
from benchmarks.sample_cost import captured
from ess_monitor.ess import DeltaRecurrence, DiagonalRecurrence, Operator
from ess_monitor.pipeline.readings import compute
from ess_monitor.runtime.backends import limit_this_thread

ROUNDS, STEPS = 24, 2
"""Rounds of one block of each kind, and steps of a block."""
BUDGET = 0.01


class Switch(Protocol):
    """An event of threads or of processes."""

    def is_set(self) -> bool: ...
    def set(self) -> None: ...
    def clear(self) -> None: ...
    def wait(self, timeout: float | None = None) -> bool: ...


def operators() -> dict[str, Operator]:
    """Return the operators of a layer: 4 sequences of 1024 tokens and 4 heads."""
    torch.manual_seed(0)
    found: dict[str, Operator] = {}
    shape = (4, 4, 1024, 16)
    decay, b, c = -0.05 * torch.rand(shape), torch.randn(shape), torch.randn(shape)
    found["GLA, n 16"] = DiagonalRecurrence(decay, b, c)
    keys, q = torch.nn.functional.normalize(torch.randn(4, 4, 1024, 64), dim=-1), torch.randn(4, 4, 1024, 64)
    found["delta rule, n 64"] = DeltaRecurrence(decay[..., :1], torch.rand(shape[:3]), keys, q)
    return found


def work(name: str, active: Switch, done: Callable[[float], None], is_over: Callable[[], bool]) -> None:
    """Measure an operator again and again while `active` is set."""
    operator = captured(operators()[name])
    limit_this_thread(1)
    done(0.0)
    while not is_over():
        if active.wait(0.1):
            started = time.thread_time()
            compute(operator, 3, 1e-3)
            done(time.thread_time() - started)


def in_process(name: str, active: Switch, stop: Switch, reports: Connection) -> None:
    """Do the same in a process of its own."""
    torch.set_num_threads(1)
    work(name, active, reports.send, stop.is_set)


def run_block(training: Training) -> list[float]:
    """Return the wall times of some steps."""
    return [training.step(None)[0][0] for _ in range(STEPS)]


def row(model: str, training: Training, name: str) -> dict[str, Any]:
    """Compare the steps beside which nothing, a thread and a process are at work."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    switches: dict[str, Switch] = {"a thread": threading.Event(), "a process": context.Event()}
    over, stop = threading.Event(), context.Event()
    of_thread: list[float] = []
    steps: dict[str, list[float]] = {"nothing": [], "a thread": [], "a process": []}
    with ExitStack() as stack:
        process = context.Process(target=in_process, args=(name, switches["a process"], stop, sender), daemon=True)
        thread = threading.Thread(target=work, args=(name, switches["a thread"], of_thread.append, over.is_set))
        for worker, end in ((process, stop), (thread, over)):
            worker.start()
            stack.callback(worker.join)
            stack.callback(end.set)
        receiver.recv()
        while not of_thread:
            time.sleep(0.01)
        for _, beside in itertools.product(range(ROUNDS), steps):
            switch = switches.get(beside)
            if switch:
                switch.set()
            steps[beside] += run_block(training)
            if switch:
                switch.clear()
    of_process = [receiver.recv() for _ in iter(receiver.poll, False)]
    medians = {beside: statistics.median(each) for beside, each in steps.items()}
    bare = medians["nothing"]
    return {
        "model": model,
        "a sample of": name,
        "bare step, ms": 1e3 * bare,
        **{f"beside {beside}": f"{medians[beside] / bare:.2f}" for beside in switches},
        "a layer in a thread, s": statistics.median(of_thread[1:]),
        "in a process, s": statistics.median(of_process) if of_process else float("nan"),
        "lock, of a training at 1 %": f"{BUDGET * (medians['a thread'] - medians['a process']) / bare:+.3%}",
    }


def run() -> Result:
    """Compare thread and process for each model and operator."""
    rows = []
    with quiet():
        for model, (build, batch) in MODELS.items():
            training = Training(build, batch)
            rows += [row(model, training, name) for name in operators()]
    notes = [
        "beside ...: a step, as a share of a bare one, while samples are computed without a pause",
        "lock: what a process would save, of a training that samples for 1 % of its time",
    ]
    return Result(f"A step beside the computation of a sample, medians of {ROUNDS} x {STEPS} steps", rows, notes)


if __name__ == "__main__":
    sys.exit(main([run], __doc__))
