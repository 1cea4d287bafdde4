from __future__ import annotations

import itertools
import math
import threading
import time

import pytest
import torch

from ess_monitor.runtime import Executor, HostBackend, RuntimeConfig, Task
from tests.runtime.simulated import Tagged


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def host_task(value: float, gate: threading.Event | None = None) -> Task:
    def compute() -> dict[str, torch.Tensor]:
        if gate is not None:
            assert gate.wait(10)
        return {"value": torch.tensor(value)}

    return Task(HostBackend(), (), compute)


@pytest.fixture
def executor():
    executor: Executor[Tagged] = Executor(RuntimeConfig(queue_length=3))
    yield executor
    executor.close()


def test_results_come_back_with_their_tag(executor: Executor[Tagged]) -> None:
    assert executor.submit(Tagged("a", tasks=[host_task(1.0), host_task(2.0)]))
    (job,) = executor.drain(10)
    assert job.tag == "a"
    assert [float(t.results["value"]) for t in job.tasks if t.results] == [1.0, 2.0]


def test_poll_never_waits_for_the_worker(executor: Executor[Tagged]) -> None:
    gate = threading.Event()
    executor.submit(Tagged("slow", tasks=[host_task(1.0, gate)]))
    assert executor.poll() == []
    gate.set()
    assert [job.tag for job in executor.drain(10)] == ["slow"]


def test_a_full_queue_drops_the_newest_and_counts_it() -> None:
    executor: Executor[Tagged] = Executor(RuntimeConfig(queue_length=2))
    gate = threading.Event()
    assert executor.submit(Tagged("a", tasks=[host_task(1.0, gate)]))
    assert executor.submit(Tagged("b", tasks=[host_task(2.0, gate)]))
    assert not executor.submit(Tagged("c", tasks=[host_task(3.0, gate)]))
    gate.set()
    assert [job.tag for job in executor.drain(10)] == ["a", "b"]
    assert executor.dropped == 1
    executor.close()


def test_a_task_that_raises_is_reported_and_the_others_go_on(executor: Executor[Tagged]) -> None:
    def explode() -> dict[str, torch.Tensor]:
        raise RuntimeError("no convergence")

    executor.submit(Tagged("a", tasks=[Task(HostBackend(), (), explode), host_task(2.0)]))
    (job,) = executor.drain(10)
    assert job.tasks[0].results is None
    assert job.tasks[0].error == "RuntimeError: no convergence"
    assert job.tasks[1].results is not None


def test_a_job_that_takes_too_long_is_given_up_and_its_late_results_are_not_seen() -> None:
    clock = Clock()
    executor: Executor[Tagged] = Executor(RuntimeConfig(timeout_seconds=5.0), clock=clock)
    gate = threading.Event()
    executor.submit(Tagged("hangs", tasks=[host_task(1.0, gate)]))
    clock.now = 4.9
    assert executor.poll() == []
    clock.now = 5.1
    (job,) = executor.poll()
    assert job.state == "abandoned"
    assert "timeout_seconds = 5" in job.error
    gate.set()
    assert executor.poll() == []
    executor.close()


def timed_task(clock: Clock, seconds: float, expected_seconds: float) -> Task:
    """A task that takes so long by the clock of the machine and by that of the thread."""

    def compute() -> dict[str, torch.Tensor]:
        clock.now += seconds
        return {}

    return Task(HostBackend(clock=clock, wall_clock=clock), (), compute, expected_seconds=expected_seconds)


def begun(clock: Clock, tasks: list[Task], **settings: float | None) -> list[bool]:
    executor: Executor[Tagged] = Executor(RuntimeConfig(**settings), clock=clock)  # type: ignore[arg-type]
    executor.submit(Tagged("a", tasks=tasks))
    while not executor._open[0].finished:
        time.sleep(0.001)
    (job,) = executor.poll()
    executor.close()
    assert job.state == "submitted"
    return [task.begun for task in job.tasks]


def test_a_job_begins_no_task_for_which_its_time_does_not_suffice() -> None:
    clock = Clock()
    tasks = [timed_task(clock, 4.0, 4.0) for _ in range(4)]
    metrics = timed_task(clock, 0.0, 0.0)
    assert begun(clock, [*tasks, metrics], sample_seconds=10.0) == [True, True, False, False, True]


def test_the_first_task_is_begun_whatever_it_takes_and_without_a_limit_all_are() -> None:
    clock = Clock()
    assert begun(clock, [timed_task(clock, 50.0, 50.0) for _ in range(2)], sample_seconds=10.0) == [True, False]
    assert begun(clock, [timed_task(clock, 50.0, 50.0) for _ in range(2)], sample_seconds=None) == [True, True]


def test_tasks_that_take_longer_than_expected_leave_less_time_for_the_next() -> None:
    clock = Clock()
    tasks = [timed_task(clock, 3.0, 1.0) for _ in range(5)]
    assert begun(clock, tasks, sample_seconds=10.0) == [True, True, True, False, False]


def test_other_load_leaves_a_job_its_time_of_a_core_up_to_three_times_the_wall_time() -> None:
    clock, of_thread = Clock(), Clock()

    def compute() -> dict[str, torch.Tensor]:
        clock.now += 10.0
        of_thread.now += 1.0
        return {}

    backend = HostBackend(clock=of_thread, wall_clock=clock)
    tasks = [Task(backend, (), compute, expected_seconds=1.0) for _ in range(6)]
    assert begun(clock, tasks, sample_seconds=10.0) == [True, True, True, True, False, False]


@pytest.mark.parametrize("ticks", [(0.0, 0.0), (9.0, 3.0), (0.0, 1e12), (0.0, math.nan), (-math.inf, math.inf)])
def test_a_thread_clock_that_lies_neither_ends_a_job_nor_makes_it_expensive(ticks: tuple[float, float]) -> None:
    clock, lies = Clock(), itertools.cycle(ticks)

    def compute() -> dict[str, torch.Tensor]:
        clock.now += 1.0
        return {}

    backend = HostBackend(clock=lambda: next(lies), wall_clock=clock)
    tasks = [Task(backend, (), compute, expected_seconds=1.0) for _ in range(5)]
    assert begun(clock, tasks, sample_seconds=10.0) == [True] * 5
    assert all(0 <= task.cost_seconds <= 1.0 for task in tasks)


def test_the_limit_that_gives_a_job_up_is_for_each_task() -> None:
    clock = Clock()
    executor: Executor[Tagged] = Executor(RuntimeConfig(timeout_seconds=5.0, sample_seconds=None), clock=clock)
    gates = [threading.Event() for _ in range(3)]
    tasks = [host_task(float(k), gate) for k, gate in enumerate(gates)]
    executor.submit(Tagged("a", tasks=tasks))
    for gate, task in zip(gates, tasks, strict=True):
        while not task.begun:
            time.sleep(0.001)
        clock.now += 4.0
        assert executor.poll() == []
        gate.set()
    (job,) = executor.drain(10)
    assert (job.state, job.lost_seconds) == ("submitted", 0.0)
    executor.close()


def test_of_a_job_that_is_given_up_the_tasks_that_are_done_stay_done() -> None:
    clock = Clock()
    executor: Executor[Tagged] = Executor(RuntimeConfig(timeout_seconds=5.0), clock=clock)
    gate = threading.Event()
    tasks = [host_task(1.0), host_task(2.0, gate), host_task(3.0)]
    executor.submit(Tagged("a", tasks=tasks))
    while not tasks[1].begun:
        time.sleep(0.001)
    clock.now = 6.0
    (job,) = executor.poll()
    assert (job.state, job.lost_seconds) == ("abandoned", 6.0)
    assert [(task.begun, task.results is not None) for task in job.tasks] == [
        (True, True),
        (True, False),
        (False, False),
    ]
    gate.set()
    executor.close()


def test_behind_a_job_that_hangs_nothing_piles_up() -> None:
    clock = Clock()
    executor: Executor[Tagged] = Executor(RuntimeConfig(timeout_seconds=5.0, queue_length=2), clock=clock)
    gate = threading.Event()
    accepted = 0
    for number in range(20):
        accepted += executor.submit(Tagged(number, tasks=[host_task(1.0, gate)]))
        clock.now += 3.0
        executor.poll()
    assert executor.stuck
    assert accepted == 2, "until the first is given up; none while the worker is in it"
    assert executor.dropped == 18
    assert len(executor) == len(executor._todo) == 0, "what they have captured would stay in memory"
    gate.set()
    deadline = time.monotonic() + 10
    while executor.stuck and time.monotonic() < deadline:
        time.sleep(0.001)
    assert executor.submit(Tagged(99, tasks=[host_task(1.0)]))
    assert [job.tag for job in executor.drain(10)] == [99]
    executor.close()


def test_the_worker_has_its_own_thread_limit_and_leaves_the_trainings_alone() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    executor: Executor[Tagged] = Executor(RuntimeConfig())

    def compute() -> dict[str, torch.Tensor]:
        seen.append(torch.get_num_threads())
        return {}

    executor.submit(Tagged("a", tasks=[Task(HostBackend(threads=1), (), compute)]))
    executor.drain(10)
    executor.close()
    assert seen == [1]
    assert torch.get_num_threads() == before


def test_close_ends_the_worker_and_refuses_new_jobs(executor: Executor[Tagged]) -> None:
    executor.submit(Tagged("a", tasks=[host_task(1.0)]))
    executor.drain(10)
    executor.close()
    assert executor._thread is not None
    assert not executor._thread.is_alive()
    assert not executor.submit(Tagged("b", tasks=[host_task(1.0)]))
