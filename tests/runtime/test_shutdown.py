"""The interpreter ends while threads of the monitor compute: its exit status stays what the training made it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ess_monitor.exporters import read_event_log

EXECUTOR = """
import sys, time, torch
from ess_monitor.runtime import Executor, RuntimeConfig, Task, Job
from ess_monitor.runtime.backends import HostBackend

def compute():
    print("computing", flush=True)
    matrix, ends = torch.eye(64), time.monotonic() + 1.5  # torch is left and entered again all the time
    while time.monotonic() < ends:
        matrix = matrix @ matrix
    print("computed", flush=True)
    return {"matrix": matrix}

backend, executor = HostBackend(), Executor(RuntimeConfig())
executor.submit(Job(tasks=[Task(backend, (), compute), Task(backend, (), compute)]))
time.sleep(0.5)
"""

AGREEMENT = """
import signal, sys, time
import torch.distributed as dist
from ess_monitor.distributed.consensus import StoreConsensus

signal.signal(signal.SIGALRM, lambda *_: sys.exit(5))
signal.setitimer(signal.ITIMER_REAL, 0.5)
store = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
StoreConsensus(store, rank=0, world_size=2, limit_seconds=20.0).exchange(0, [1.0], lambda posts: posts[0])
"""

MONITOR = """
import sys, torch
from torch import nn
from ess_monitor import Monitor, MonitorConfig
from ess_monitor.exporters import EventLogConfig
from ess_monitor.featurizers import GLA

torch.set_num_threads(1)
model = nn.Sequential(*(GLA(128, 4) for _ in range(4)))
config = MonitorConfig(every_n_steps=1, exporters=(EventLogConfig(path=sys.argv[1]),))
monitor = Monitor(model, config)
monitor.start()
for _ in range(2):
    model(torch.randn(4, 256, 128)).sum().backward()
    monitor.step()
"""


SINK = """
import time

class Slow:
    name, inline = "slow", False
    def start(self, run, snapshot): pass
    def export(self, measurement):
        print("exporting", flush=True)
        matrix, ends = torch.eye(64), time.monotonic() + 1.5
        while time.monotonic() < ends:
            matrix = matrix @ matrix
        print("exported", flush=True)
    def close(self, status): print(status)

monitor = Monitor(model, MonitorConfig(), exporters=[Slow()])
monitor.start()
model(torch.randn(4, 16, 128)).sum().backward()
monitor.step()
monitor.flush()
time.sleep(0.2)
monitor._hub.close("finished", timeout_seconds=0.05)
monitor.close()
sys.exit(3)
"""


SERVER = """
import json, os, sys
import torch.distributed, torch._dynamo
import ess_monitor.exporters, ess_monitor.featurizers

for line in sys.stdin:
    program, printed, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        for number in (1, 2):
            os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.argv[1:] = arguments
        exec(program, {})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    """Forks a process for each program, which has the imports behind it."""
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.communicate()


@pytest.fixture
def status_of(server: subprocess.Popen[str], tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs a program with arguments; its exit status and what it printed."""

    def run(program: str, *arguments: str) -> tuple[int, str]:
        printed = tmp_path / "printed"
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps([program, str(printed), arguments]) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline()), printed.read_text()

    return run


@pytest.mark.parametrize("close", ["", "executor.close(0.01)"])
def test_the_worker_ends_with_the_layer_it_is_at(status_of: Any, close: str) -> None:
    status, printed = status_of(f"{EXECUTOR}\n{close}\nsys.exit(3)")
    assert status == 3, printed
    assert printed.split() == ["computing", "computed"]


def test_a_worker_that_hangs_does_not_keep_the_process(status_of: Any) -> None:
    hangs = EXECUTOR.replace('print("computing", flush=True)', "time.sleep(3600)")
    program = hangs.replace("RuntimeConfig()", "RuntimeConfig(timeout_seconds=0.1)")
    status, printed = status_of(f"{program}\nexecutor.poll()\nassert executor.stuck\nsys.exit(3)")
    assert status == 3, printed


def test_a_sink_may_take_the_measurement_it_is_at(status_of: Any) -> None:
    status, printed = status_of(MONITOR.partition("config =")[0] + SINK)
    assert status == 3, printed
    assert "is left behind" in printed
    assert "exported\nfinished\n" in printed


def test_a_rank_that_waits_for_the_others_can_leave(status_of: Any) -> None:
    status, printed = status_of(AGREEMENT)
    assert status == 5, printed


@pytest.mark.parametrize(("end", "expected"), [("sys.exit(3)", 3), ("raise ValueError", 1)])
def test_a_monitor_that_nobody_closed_is_closed_as_failed(
    status_of: Any, end: str, expected: int, tmp_path: Path
) -> None:
    log = tmp_path / "events.jsonl"
    status, printed = status_of(f"{MONITOR}\n{end}", str(log))
    assert status == expected, printed
    assert printed.count("the monitor was never closed") == 1
    events = list(read_event_log(log))
    assert [e.data.status for e in events if e.event == "run_finished"] == ["failed"]
    measured = [e.data for e in events if e.event == "measurement"]
    assert [r.status for m in measured for r in m.readings] == ["ok"] * 4 * len(measured)
    assert measured


def test_a_monitor_that_cannot_be_closed_changes_no_exit_status(status_of: Any, tmp_path: Path) -> None:
    end = "monitor._results.autopilot.close = lambda: 1 / 0\nsys.exit(3)"
    status, printed = status_of(f"{MONITOR}\n{end}", str(tmp_path / "events.jsonl"))
    assert status == 3
    assert "could not be closed at the end of the process" in printed


def test_a_forked_child_that_ends_by_itself_leaves_the_monitor_to_its_parent(status_of: Any, tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    end = """
import os, warnings
warnings.simplefilter("ignore")
child = os.fork()
if child == 0:
    sys.exit(4)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
monitor.close()
"""
    status, printed = status_of(f"{MONITOR}\n{end}", str(log))
    assert (status, printed) == (0, "")
    assert [e.data.status for e in read_event_log(log) if e.event == "run_finished"] == ["finished"]
