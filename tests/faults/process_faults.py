"""Processes that are killed and resumed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

from ess_monitor.exporters import read_event_log
from tests.faults.harness import Injection, Outcome, backbone, batches, case, state_bytes, train
from tests.faults.victim import LAST, TOTAL, resumable

ROOT = Path(__file__).parents[2]


@case("the process gets SIGKILL at a random step and is resumed from its last checkpoint")
def killed_and_resumed(injection: Injection) -> Outcome:
    return _ended_by(signal.SIGKILL, injection)


@case("the process gets SIGTERM at a random step and is resumed from its last checkpoint")
def terminated_and_resumed(injection: Injection) -> Outcome:
    return _ended_by(signal.SIGTERM, injection)


def _ended_by(number: signal.Signals, injection: Injection) -> Outcome:
    command = [sys.executable, "-m", "tests.faults.victim", str(injection.folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(command, **pipes) as victim:  # type: ignore[call-overload]
        for _ in range(random.SystemRandom().randint(1, LAST)):
            victim.stdout.readline()
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
    clean = number == signal.SIGTERM
    return Outcome(
        train(bare := backbone(), batches(TOTAL)).endswith(state_bytes(model)) and state_bytes(bare) != b"",
        {
            "ended by the signal": victim.returncode == (143 if clean else -number),
            "both parts in one log": kinds.count("run_started") == 2 and events.skipped_lines <= 1,
            "how each ended": ends == (["failed", "finished"] if clean else ["finished"]),
            "samples on schedule": set(range(LAST, TOTAL, 2)) <= set(steps) and all(step % 2 == 0 for step in steps),
        },
    )
