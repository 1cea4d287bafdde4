"""SIGTERM to a process with a monitor: each sink holds how the run ended, and the process ends as it would without."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from ess_monitor.exporters import read_event_log
from ess_monitor.runtime import termination
from tests.programs import run_program

pytestmark = pytest.mark.skipif(os.name != "posix", reason="this system has no SIGTERM")

PROGRAM = """
import os, signal, sys, time, torch
from torch import nn
from ess_monitor import Monitor, MonitorConfig
from ess_monitor.featurizers import GLA

model = nn.Sequential(GLA(8, 1))
sinks = [
    {"kind": "event_log", "path": "events.jsonl"},
    {"kind": "textfile", "path": "metrics.prom"},
    {"kind": "prometheus", "port": 0, "file_sd_dir": "targets", "linger_seconds": 600},
]
config = MonitorConfig.load(every_n_steps=2, exporters=sinks, overhead_budget_ratio=None, **SETTINGS)
asked = []

def train(steps=200, until=lambda: False):
    for step in range(1, steps + 1):
        model(torch.ones(2, 8, 8)).sum().backward()
        monitor.step()
        if step == 3:
            assert len(os.listdir("targets")) == 1
            for _ in range(2):  # `timeout` sends it to the process, and then to its group
                os.kill(os.getpid(), signal.SIGTERM)
        if step > 3:
            time.sleep(0.05)
        if until():
            break
    assert len(asked) < 3, asked
"""
START = "with Monitor(model, config) as monitor:\n    train()\n"
SLURM = {"SLURM_JOB_ID": "4711"}
ENDED = ("terminated", "terminated", 0)
GOES_ON = ("finished", "finished", 0)


def ends(body: str, folder: Path, environ: dict[str, str], settings: str = "{}") -> tuple[int, tuple[str, str, int]]:
    """Exit status of a program, and what event log, textfile and folder of targets hold after it."""
    environ = {**{k: v for k, v in os.environ.items() if k not in termination.SCHEDULER_VARIABLES}, **environ}
    code = f"SETTINGS = {settings}\n{PROGRAM}\n{body}"
    ended = run_program(["-c", code], folder, cwd=folder, env=environ, imports=["prometheus_client"])
    assert "Traceback" not in ended.stderr, ended.stderr
    last = [event.data.status for event in read_event_log(folder / "events.jsonl") if event.event == "run_finished"]
    lines = (folder / "metrics.prom").read_text().splitlines()
    states = [line for line in lines if line.startswith("ess_monitor_run_status{") and line.endswith(" 1.0")]
    assert len(states) == 1
    assert len(last) <= 1
    state = states[0].partition('status="')[2].partition('"')[0]
    return ended.returncode, ("".join(last), state, len(os.listdir(folder / "targets")))


@pytest.mark.parametrize(
    ("environ", "settings"), [(SLURM, "{}"), ({}, '{"handle_sigterm": True}'), ({"PBS_JOBID": "7"}, "{}")]
)
def test_where_nobody_handles_the_signal_the_process_ends_by_it(
    environ: dict[str, str], settings: str, tmp_path: Path
) -> None:
    assert ends(START, tmp_path, environ, settings) == (-signal.SIGTERM, ENDED)


@pytest.mark.parametrize(("environ", "settings"), [({}, "{}"), (SLURM, '{"handle_sigterm": False}')])
def test_without_a_scheduler_or_where_it_is_not_wanted_nothing_is_installed(
    environ: dict[str, str], settings: str, tmp_path: Path
) -> None:
    status, (log, textfile, targets) = ends(START, tmp_path, environ, settings)
    assert (status, log, targets) == (-signal.SIGTERM, "", 1)
    assert textfile in ("starting", "running")


OTHER_HANDLERS = {
    "raises": ("def other(number, frame):\n    asked.append(number)\n    sys.exit(9)", START, 9),
    "ends the process": ("def other(number, frame):\n    os._exit(7)", START, 7),
    "sets a flag": (
        "def other(number, frame):\n    asked.append(number)",
        "with Monitor(model, config) as monitor:\n    train(until=lambda: asked)\nassert asked\n",
        0,
    ),
    "no with": (
        "def other(number, frame):\n    asked.append(number)",
        "monitor = Monitor(model, config)\nmonitor.start()\ntrain(until=lambda: asked)\nsys.exit(4)\n",
        4,
    ),
}


@pytest.mark.parametrize("kind", OTHER_HANDLERS)
def test_the_handler_from_before_is_called_after_the_sinks_were_closed(kind: str, tmp_path: Path) -> None:
    other, training, status = OTHER_HANDLERS[kind]
    body = f"{other}\nsignal.signal(signal.SIGTERM, other)\n{training}"
    assert ends(body, tmp_path, SLURM) == (status, ENDED)


CHAINED = """
with Monitor(model, config) as monitor:
    before = signal.getsignal(signal.SIGTERM)
    later = lambda number, frame: (asked.append(number), before(number, frame))  # as Lightning's Trainer does
    signal.signal(signal.SIGTERM, later)
    train(until=lambda: asked)
assert signal.getsignal(signal.SIGTERM) is later, "a handler that was installed later is left alone"
assert asked
signal.signal(signal.SIGTERM, before)
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_handler_installed_later_that_calls_this_one_decides_what_happens(tmp_path: Path) -> None:
    # At the end the handler is back, without a run: it leaves the signal to the default.
    assert ends(CHAINED, tmp_path, SLURM) == (-signal.SIGTERM, ENDED)


HANGS = """
from ess_monitor.runtime import termination
termination._END_SECONDS = 0.5

class Hangs:
    name, inline = "hangs", True
    def start(self, run, snapshot): ...
    def export(self, measurement): ...
    def close(self, status): time.sleep(600)

with Monitor(model, config, exporters=[Hangs()]) as monitor:
    train()
"""


def test_a_sink_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    assert ends(HANGS, tmp_path, SLURM)[0] == -signal.SIGTERM


def test_ignored_signals_stay_ignored(tmp_path: Path) -> None:
    ignored = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    assert ends(f"{ignored}{START.replace('train()', 'train(5)')}", tmp_path, SLURM) == (0, GOES_ON)


class Run:
    """Something that ends a run."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def end(self) -> None:
        self.ended.set()


@pytest.fixture
def run() -> Iterator[Run]:
    run = Run()
    yield run
    termination.forget(run.end)


def _previous(number: int, frame: FrameType | None) -> None: ...


@pytest.fixture
def previous() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, _previous)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_handler_from_before_comes_back_with_the_last_run(run: Run, previous: None) -> None:
    other = Run()
    for watched in (run, other):
        termination.watch(watched.end, True)
    termination.forget(run.end)
    assert signal.getsignal(signal.SIGTERM) is not _previous
    termination.forget(other.end)
    assert signal.getsignal(signal.SIGTERM) is _previous


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_the_handler_from_before(run: Run) -> None:
    before = signal.getsignal(signal.SIGTERM)
    termination.watch(run.end, True)
    child = os.fork()
    if child == 0:
        os._exit(int(signal.getsignal(signal.SIGTERM) is not before))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not run.ended.is_set()


def test_a_run_of_another_thread_installs_nothing_and_says_so(
    run: Run, previous: None, caplog: pytest.LogCaptureFixture
) -> None:
    thread = threading.Thread(target=termination.watch, args=(run.end, True))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is _previous
    assert "not started on the main thread" in caplog.text
