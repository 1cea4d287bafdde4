"""Faults of processes: killed and resumed, ended without `close`, forked, loading data."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from ess_monitor import Monitor
from ess_monitor.exporters import read_event_log
from tests.faults.harness import (
    ROOT,
    STEPS,
    Injection,
    Outcome,
    backbone,
    batches,
    case,
    no_thread_stays,
    state_bytes,
    train,
    watch,
)
from tests.faults.victim import LAST, TOTAL, resumable
from tests.programs import Program


@case("the process gets SIGKILL at a random step and is resumed from its last checkpoint")
def killed_and_resumed(injection: Injection) -> Outcome:
    return _ended_by(signal.SIGKILL, injection)


@case("the process gets SIGTERM at a random step and is resumed from its last checkpoint")
def terminated_and_resumed(injection: Injection) -> Outcome:
    return _ended_by(signal.SIGTERM, injection)


@case("the process gets SIGINT (Ctrl-C) at a random moment and is resumed from its last checkpoint")
def interrupted_and_resumed(injection: Injection) -> Outcome:
    return _ended_by(signal.SIGINT, injection)


def _ended_by(number: signal.Signals, injection: Injection) -> Outcome:
    streams = {name: injection.folder / name for name in ("stdin", "stdout")}
    for path in streams.values():
        os.mkfifo(path)
    command = ["-m", "tests.faults.victim", str(injection.folder)]
    victim = Program(command, injection.folder, cwd=ROOT, **streams)
    with streams["stdin"].open("w"), streams["stdout"].open() as printed:
        dice = random.SystemRandom()
        for _ in range(dice.randint(1, LAST)):
            printed.readline()
        time.sleep(dice.uniform(0, 0.01))  # anywhere in a step
        victim.send_signal(number)
        victim.wait()
    model = resumable(injection.folder, TOTAL)
    events = read_event_log(injection.folder / "events.jsonl")
    kinds, steps, ends = [], [], []
    for event in events:
        kinds.append(event.event)
        if event.event == "measurement":
            steps.append(event.data.step)
        if event.event == "run_finished":
            ends.append(event.data.status)
    clean, first = number != signal.SIGKILL, "terminated" if number == signal.SIGTERM else "failed"
    return Outcome(
        train(bare := backbone(), batches(TOTAL)).endswith(state_bytes(model)) and state_bytes(bare) != b"",
        {
            "ended by the signal": victim.returncode == (143 if number == signal.SIGTERM else -number),
            "both parts in one log": kinds.count("run_started") == 2 and events.skipped_lines <= 1,
            "how each ended": ends == ([first, "finished"] if clean else ["finished"]),
            "samples on schedule": set(range(LAST, TOTAL, 2)) <= set(steps) and all(step % 2 == 0 for step in steps),
        },
    )


@case("the process ends by itself while the worker computes, and the monitor was never closed")
def left_without_close(injection: Injection) -> Outcome:
    command = [sys.executable, "-m", "tests.faults.victim", str(injection.folder), "leave"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    events = list(read_event_log(injection.folder / "events.jsonl"))
    return Outcome(
        (injection.folder / "state").read_bytes() == train(backbone()),
        {
            "the exit status of the training": ended.returncode == 7,
            "log": ended.stderr.count("the monitor was never closed") == 1,
            "run_finished": [e.data.status for e in events if e.event == "run_finished"] == ["failed"],
            "what was measured came in": any(e.event == "measurement" for e in events),
        },
    )


@case("batches come from a forked worker of a DataLoader while the monitor's threads run")
def data_loader_forks(injection: Injection) -> Outcome:
    return _loaded("fork")


@case("batches come from a spawned worker of a DataLoader while the monitor's threads run")
def data_loader_spawns(injection: Injection) -> Outcome:
    return _loaded("spawn")


class _Late:
    """Starts the worker at the second step, when the monitor already runs."""

    def __init__(self, data: list[torch.Tensor], context: str) -> None:
        self._data, self._context = data, context

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield self._data[0]
        yield from DataLoader(
            self._data[1:],  # type: ignore[arg-type]
            batch_size=None,
            num_workers=1,
            multiprocessing_context=self._context,
        )


def _loaded(context: str) -> Outcome:
    data, before = batches(), threading.enumerate()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        run = watch(data=_Late(data, context), bare_data=data)
    return Outcome(
        run.unchanged,
        {
            "every sample ok": run.sink.steps == list(range(0, STEPS, 2)) and set(run.statuses) == {"ok"},
            "no thread stays": no_thread_stays(before),
        },
    )


@case("a process is forked while the monitor's threads hold their locks, and closes its copy of the monitor")
def forked_child_closes(injection: Injection) -> Outcome:
    ended: list[int] = []

    def meanwhile(step: int, monitor: Monitor) -> None:
        if step != 5:
            return
        with monitor._queue._executor._wake, monitor._context.counters._lock, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            child = os.fork()
            if child == 0:
                signal.alarm(20)  # ends a child that hangs
                monitor.close("failed")
                os._exit(0)
        ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    run = watch(meanwhile=meanwhile)
    return Outcome(
        run.unchanged,
        {
            "the child ends": ended == [0],
            "the parent goes on": run.sink.steps == list(range(0, STEPS, 2)) and run.sink.closed == ["finished"],
        },
    )
