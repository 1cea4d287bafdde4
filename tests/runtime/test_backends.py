"""The worker's number of threads is its own: the training and threads that start later keep theirs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch

from ess_monitor import Monitor, MonitorConfig
from ess_monitor.featurizers import GLA
from ess_monitor.runtime import Executor, HostBackend, RuntimeConfig, Task, backends
from tests.runtime.simulated import Tagged

Result = TypeVar("Result")


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_a_new_thread(function: Callable[[], Result]) -> Result:
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(30)
    return results[0]


def in_the_backend(backend: HostBackend, times: int = 1) -> list[int]:
    """Threads that each of so many computations of one thread runs with."""
    seen: list[int] = []

    def compute() -> dict[str, torch.Tensor]:
        torch.ones(200, 200) @ torch.ones(200, 200)
        seen.append(torch.get_num_threads())
        return {}

    for _ in range(times):
        backend.launch(Task(backend, (), compute))
    return seen


def test_threads_that_start_after_a_measurement_compute_with_the_trainings_number() -> None:
    model = GLA(16, 2)
    with Monitor(model, MonitorConfig(every_n_steps=1), exporters=[]) as monitor:
        model(torch.randn(2, 32, 16)).square().mean().backward()
        monitor.step()
        monitor.flush()
        assert monitor.snapshot().measurements_total["ok"] == 1
        assert (in_a_new_thread(torch.get_num_threads), torch.get_num_threads()) == (2, 2)
    assert (in_a_new_thread(torch.get_num_threads), torch.get_num_threads()) == (2, 2)


def test_a_thread_that_was_there_before_and_computes_only_later_has_the_trainings_number_too() -> None:
    measured, seen = threading.Event(), []

    def early() -> None:
        assert measured.wait(30)
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=early)
    thread.start()
    in_a_new_thread(lambda: in_the_backend(HostBackend()))
    measured.set()
    thread.join(30)
    assert seen == [2]


def test_the_limit_holds_for_every_computation_of_the_worker() -> None:
    assert in_a_new_thread(lambda: in_the_backend(HostBackend(threads=1), times=3)) == [1, 1, 1]
    assert in_a_new_thread(lambda: in_the_backend(HostBackend(threads=3))) == [3]
    assert (in_a_new_thread(torch.get_num_threads), torch.get_num_threads()) == (2, 2)


def test_a_second_worker_of_the_same_lane_has_the_limit_too() -> None:
    backend = HostBackend(threads=1)
    assert [in_a_new_thread(lambda: in_the_backend(backend)) for _ in range(2)] == [[1], [1]]


def test_the_limit_is_set_once_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    real = torch.set_num_threads

    def counted(threads: int) -> None:
        calls.append((threading.get_ident(), threads))
        real(threads)

    monkeypatch.setattr(torch, "set_num_threads", counted)
    in_a_new_thread(lambda: in_the_backend(HostBackend(), times=3))
    assert [threads for _, threads in calls] == [1, 2]
    assert len({ident for ident, _ in calls}) == 2


def test_workers_that_begin_at_the_same_moment_do_not_take_each_others_limit_for_the_trainings() -> None:
    for _ in range(20):
        three = [HostBackend(threads=1), HostBackend(threads=3), HostBackend(threads=1)]
        together = threading.Barrier(len(three))
        seen: list[list[int]] = []

        def work(backend: HostBackend, together: threading.Barrier, seen: list[list[int]]) -> None:
            together.wait(30)
            seen.append(in_the_backend(backend))

        threads = [threading.Thread(target=work, args=(backend, together, seen)) for backend in three]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(seen) == [[1], [1], [3]]
        assert (in_a_new_thread(torch.get_num_threads), torch.get_num_threads()) == (2, 2)


def test_the_number_for_new_threads_is_the_trainings_whenever_the_lock_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []
    real = torch.set_num_threads

    def looked(threads: int) -> None:
        held.append(backends._THREAD_COUNT_LOCK.locked())
        real(threads)

    monkeypatch.setattr(torch, "set_num_threads", looked)
    executor: Executor[Tagged] = Executor(RuntimeConfig())
    executor.submit(Tagged("a", tasks=[Task(HostBackend(), (), dict)]))
    executor.drain(10)
    executor.close()
    assert held == [True, True]
    assert not backends._THREAD_COUNT_LOCK.locked()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_waits_for_that_lock_and_the_child_has_it_free() -> None:
    ended: list[int] = []

    def fork() -> None:
        child = os.fork()
        if child == 0:
            os._exit(backends._THREAD_COUNT_LOCK.locked())
        ended.append(os.waitpid(child, 0)[1])

    thread = threading.Thread(target=fork)
    with backends._THREAD_COUNT_LOCK:
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
    thread.join(30)
    assert ended == [0]
    assert not backends._THREAD_COUNT_LOCK.locked()
