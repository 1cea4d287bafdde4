"""A signal handler of the user's that calls the monitor while its thread is at any line of it.

Python calls a handler between two lines, on the thread that runs them. A trace function is called there too.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import ess_monitor
from ess_monitor import Monitor, MonitorConfig
from ess_monitor.exporters import EventLogConfig, EventLogExporter, read_event_log
from ess_monitor.featurizers import GLA
from tests.exporters.helpers import RecordingExporter

PACKAGE = str(Path(ess_monitor.__file__).parent)


class At:
    """Calls `handler` once, at the line of the package with this number."""

    def __init__(self, line: int, handler: Callable[[], None]) -> None:
        self.left, self.handler = line, handler

    def __enter__(self) -> At:
        self.before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *details: object) -> None:
        sys.settrace(self.before)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.handler()
        return self._trace


class Run:
    """A monitor whose next step takes a sample in, and hands a measured one to a log, an inline and a queued sink."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.model = nn.Sequential(GLA(8, 1))
        self.log = folder / "events.jsonl"
        self.inline, self.queued = RecordingExporter("inline", inline=True), RecordingExporter("queued")
        config = MonitorConfig(every_n_steps=1, overhead_budget_ratio=None, **settings)
        sinks = (EventLogExporter(EventLogConfig(path=self.log)), self.inline, self.queued)
        self.monitor = Monitor(self.model, config, exporters=sinks)
        self.monitor.start()
        self.prepare()

    def prepare(self) -> None:
        """Leave one sample measured, and the next captured."""
        self.monitor.flush()
        self.forward()
        self.monitor.disarm()
        executor = self.monitor._queue._executor
        executor._wait_for(executor._open, 30)
        self.monitor.arm()
        self.forward()

    def forward(self) -> None:
        self.model(torch.ones(2, 8, 8)).sum().backward()

    @property
    def ends(self) -> list[str]:
        return [event.data.status for event in read_event_log(self.log) if event.event == "run_finished"]


@pytest.fixture
def lines_of(tmp_path: Path) -> Callable[[str], int]:
    """Counts the lines of the package in a call of such a monitor. The first one has more, once in a process."""

    def count(call: str) -> int:
        for name in ("first", "second"):
            counted, run = At(0, lambda: None), Run(tmp_path / name)
            with counted:
                getattr(run.monitor, call)()
            run.monitor.close()
        assert -counted.left > 200
        return -counted.left

    return count


@pytest.fixture
def lines(lines_of: Callable[[str], int]) -> int:
    return lines_of("step")


def spread(lines: int, number: int) -> Iterator[int]:
    """Some of the lines."""
    return iter(range(1, lines - 20, lines // number))


@pytest.mark.parametrize(("call", "number"), [("step", 30), ("flush", 8), ("disarm", 8), ("close", 8)])
def test_close_ends_the_run_at_any_line_of_a_call(
    call: str,
    number: int,
    lines_of: Callable[[str], int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for line in spread(lines_of(call), number):
        run = Run(tmp_path / str(line))
        closed: list[tuple[str, ...]] = []

        def close(run: Run = run, closed: list[tuple[str, ...]] = closed) -> None:
            run.monitor.close("failed")
            closed.append((run.queued.calls[-1].split()[0], *run.ends))

        with At(line, close):
            getattr(run.monitor, call)()
        status = run.ends[0]
        assert status in (("failed", "finished") if call == "close" else ("failed",))
        assert closed == [("close", status)], f"line {line}"
        assert (run.inline.calls.count(f"close {status}"), run.inline.calls[-1]) == (1, f"close {status}"), (
            f"line {line}"
        )
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in run.model.modules())
        run.monitor.close()
        assert run.ends == [status]
    assert "left behind" not in caplog.text


def test_close_at_any_line_of_a_sampled_forward_pass_leaves_it_alone(tmp_path: Path) -> None:
    """PyTorch goes on with the hooks that were there when it began with them, and passes them less once removed."""
    for line in range(1, 250, 10):
        run = Run(tmp_path / str(line))
        with At(line, lambda run=run: run.monitor.close("failed")):  # type: ignore[misc]
            run.forward()
        assert run.monitor.snapshot().status == "failed", f"line {line}"
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in run.model.modules())


def test_snapshot_and_flush_answer_at_any_line_of_a_step(
    lines: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    for line in spread(lines, 30):
        seen: list[int] = []

        def look(seen: list[int] = seen) -> None:
            seen.append(run.monitor.snapshot().steps_total)
            seen.append(len(run.monitor.flush(5.0)))
            assert run.monitor.state_dict()["step"] >= 0

        with At(line, look):
            run.monitor.step()
        run.prepare()
        assert seen[1:] == [1], f"line {line}"
    run.monitor.close()
    assert run.ends == ["finished"]
    assert "left behind" not in caplog.text
    assert "failed" not in caplog.text


def test_another_thread_takes_a_snapshot_while_a_handler_has_interrupted_a_count(lines: int, tmp_path: Path) -> None:
    run = Run(tmp_path)
    counts = run.monitor._context.counters
    with counts._lock:  # as the interrupted line holds it
        reader = threading.Thread(target=run.monitor.snapshot)
        reader.start()
        reader.join(30)
        assert not reader.is_alive()
    run.monitor.close()


@pytest.mark.skipif(os.name != "posix", reason="this system has no SIGTERM")
def test_sigterm_at_any_line_of_a_step_ends_the_run_and_then_calls_the_handler_from_before(
    lines: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        for line in spread(lines, 20):
            run = Run(tmp_path / str(line), handle_sigterm=True)
            came.clear()
            with At(line, lambda: signal.raise_signal(signal.SIGTERM)):
                run.monitor.step()
            ends = time.monotonic() + 60
            while not came and time.monotonic() < ends:
                time.sleep(0.01)
            assert came
            assert (run.queued.calls[-1], run.inline.calls[-1], run.ends) == (
                "close terminated",
                "close terminated",
                ["terminated"],
            ), f"line {line}"
            run.forward()
            run.monitor.step()  # the training goes on until the other handler ends it
            assert run.monitor.snapshot().status == "terminated"
            run.monitor.close("failed")
            assert run.ends == ["terminated"]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "closed" not in caplog.text
    assert "left behind" not in caplog.text
