from __future__ import annotations

import threading
import time

import pytest
import torch

from ess_monitor.runtime import Executor, HostBackend, RuntimeConfig, StreamBackend, Task
from tests.runtime.simulated import SimulatedStreams, Tagged


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


def wait_until_launched(executor: Executor[Tagged], jobs: int) -> None:
    deadline = time.monotonic() + 10
    while sum(job.finished for job in executor._open) < jobs:
        assert time.monotonic() < deadline, "the worker never launched the jobs"
        time.sleep(0.001)


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


class TestOnASimulatedDevice:
    """Completion is late and out of turn; what the training thread sees must not depend on it."""

    @pytest.fixture
    def device(self) -> SimulatedStreams:
        return SimulatedStreams()

    def stream_task(self, backend: StreamBackend, tensor: torch.Tensor) -> Task:
        return Task(backend, (tensor,), lambda: {"double": tensor * 2})

    def test_nothing_is_done_before_the_side_stream_has_run(self, device: SimulatedStreams, executor) -> None:
        backend = StreamBackend(device)
        executor.submit(Tagged("a", tasks=[self.stream_task(backend, torch.ones(2))]))
        wait_until_launched(executor, 1)
        assert executor.poll() == []
        device.side[0].run()
        (job,) = executor.poll()
        assert job.tasks[0].results["double"].tolist() == [2.0, 2.0]

    def test_the_side_stream_waits_for_the_copies_on_the_main_stream(self, device: SimulatedStreams, executor) -> None:
        backend = StreamBackend(device)
        device.main.work.append(lambda: None)  # the copy, still queued
        executor.submit(Tagged("a", tasks=[self.stream_task(backend, torch.ones(2))]))
        wait_until_launched(executor, 1)
        device.side[0].run()
        assert executor.poll() == []
        device.main.run()
        device.side[0].run()
        assert [job.tag for job in executor.poll()] == ["a"]

    def test_a_later_job_that_is_done_first_waits_for_the_earlier_one(self, device: SimulatedStreams, executor) -> None:
        slow, fast = StreamBackend(device), StreamBackend(device)
        executor.submit(Tagged("first", tasks=[self.stream_task(slow, torch.ones(1))]))
        executor.submit(Tagged("second", tasks=[self.stream_task(fast, torch.ones(1))]))
        wait_until_launched(executor, 2)
        device.side[1].run()
        assert executor.poll() == []
        device.side[0].run()
        assert [job.tag for job in executor.poll()] == ["first", "second"]

    def test_the_allocator_is_told_of_every_input_that_the_side_stream_reads(self, device, executor) -> None:
        backend = StreamBackend(device)
        tensor = torch.ones(2)
        executor.submit(Tagged("a", tasks=[self.stream_task(backend, tensor)]))
        wait_until_launched(executor, 1)
        assert [(t is tensor, stream) for t, stream in device.kept] == [(True, device.side[0])]

    def test_a_job_with_one_unfinished_task_is_not_done(self, device: SimulatedStreams, executor) -> None:
        one, other = StreamBackend(device), StreamBackend(device)
        executor.submit(
            Tagged("a", tasks=[self.stream_task(one, torch.ones(1)), self.stream_task(other, torch.ones(1))])
        )
        wait_until_launched(executor, 1)
        device.side[0].run()
        assert executor.poll() == []
        device.side[1].run()
        (job,) = executor.poll()
        assert sum(t.cost_seconds() for t in job.tasks) == pytest.approx(0.004)

    def test_a_device_that_never_finishes_is_given_up(self, device: SimulatedStreams) -> None:
        clock = Clock()
        executor: Executor[Tagged] = Executor(RuntimeConfig(timeout_seconds=1.0), clock=clock)
        executor.submit(Tagged("a", tasks=[self.stream_task(StreamBackend(device), torch.ones(1))]))
        wait_until_launched(executor, 1)
        clock.now = 2.0
        assert [job.state for job in executor.poll()] == ["abandoned"]
        executor.close()


@pytest.mark.gpu
def test_results_of_a_real_side_stream_arrive_on_the_host() -> None:
    from ess_monitor.runtime import backend_for

    backend = backend_for(torch.device("cuda"), threads=1)
    assert isinstance(backend, StreamBackend)
    executor: Executor[Tagged] = Executor(RuntimeConfig())
    x = torch.randn(4, 64, 64, device="cuda")
    executor.submit(Tagged("a", tasks=[Task(backend, (x,), lambda: {"s": torch.linalg.svdvals(x)})]))
    (job,) = executor.drain(60)
    result = job.tasks[0].results["s"]
    assert result.device.type == "cpu"
    assert result.is_pinned()
    torch.testing.assert_close(result, torch.linalg.svdvals(x.cpu()), atol=1e-4, rtol=1e-4)
    assert job.tasks[0].cost_seconds() > 0
    executor.close()
