"""Tensors of an accelerator reach the host late; the training thread never waits for them, the worker never asks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from ess_monitor.runtime import Executor, RuntimeConfig, StreamBackend, Task, backend_for
from tests.runtime.simulated import SimulatedStream, SimulatedStreams, Tagged


class Elsewhere(torch.Tensor):
    """A tensor that says it is not on the CPU, so that its copies are those of the simulated device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("meta")


def elsewhere(*values: float) -> torch.Tensor:
    return torch.tensor(values).as_subclass(Elsewhere)


def doubled(backend: StreamBackend, *tensors: torch.Tensor) -> Task:
    def compute(*inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {str(index): tensor * 2 for index, tensor in enumerate(inputs)}

    return Task(backend, tensors, compute, (backend.ready(),))


def results(job: Tagged) -> list[list[float]]:
    return [value.tolist() for task in job.tasks for value in (task.results or {}).values()]


def wait_for_the_worker(executor: Executor[Tagged], jobs: int = 1) -> None:
    deadline = time.monotonic() + 10
    while sum(job.finished for job in executor._open) < jobs:
        assert time.monotonic() < deadline, "the worker never finished the jobs"
        time.sleep(0.001)


@pytest.fixture
def device() -> SimulatedStreams:
    return SimulatedStreams()


@pytest.fixture
def backend(device: SimulatedStreams) -> StreamBackend:
    return StreamBackend(device)


@pytest.fixture
def executor() -> Iterator[Executor[Tagged]]:
    executor: Executor[Tagged] = Executor(RuntimeConfig(queue_length=3))
    yield executor
    executor.close()


def test_nothing_is_computed_before_the_copy_is_done(device, backend, executor) -> None:
    executor.submit(Tagged("a", tasks=[doubled(backend, elsewhere(1, 2))]))
    assert executor.poll() == []
    assert not executor._todo
    device.side.run()
    assert executor.poll() == []  # but now the worker has it
    wait_for_the_worker(executor)
    (job,) = executor.poll()
    assert results(job) == [[2.0, 4.0]]


def test_a_drain_hands_over_what_arrives_while_it_waits(device, backend, executor) -> None:
    executor.submit(Tagged("a", tasks=[doubled(backend, elsewhere(1))]))
    later = threading.Timer(0.05, device.side.run)
    later.start()
    (job,) = executor.drain(10)
    assert results(job) == [[2.0]]


def test_the_copy_waits_for_the_stream_that_made_the_tensors_and_for_nothing_later(device, backend, executor) -> None:
    other = SimulatedStream("other")
    captured = elsewhere(0)
    with device.on(other):
        other.work.append(lambda: captured.fill_(3.0))
        task = doubled(backend, captured)  # marked here, on the stream of the copy
    other.work.append(lambda: pytest.fail("the backward pass is not waited for"))
    device.main.work.append(lambda: pytest.fail("the rest of the step is not waited for"))
    executor.submit(Tagged("a", tasks=[task]))
    device.side.run()
    executor.poll()
    assert device.side.done == 0
    other.run(1)
    device.side.run()
    (job,) = executor.drain(10)
    assert results(job) == [[6.0]]


def test_tensors_of_every_dtype_and_shape_arrive_as_they_are(device, backend, executor) -> None:
    given = [
        torch.tensor([True, False, True]),
        torch.randn(3, 5).bfloat16(),
        torch.randn(2, 1, 7, dtype=torch.float64),
        torch.tensor(0.5),
        torch.arange(5),
        torch.randn(3, dtype=torch.complex64),
        torch.zeros(0, 4),
    ]
    seen: list[torch.Tensor] = []
    task = Task(backend, tuple(t.as_subclass(Elsewhere) for t in given), lambda *t: seen.extend(t) or {})
    executor.submit(Tagged("a", tasks=[task]))
    device.side.run()
    executor.drain(10)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(seen, given, strict=True))


def test_a_sample_takes_one_buffer_which_the_next_one_uses_again(device, backend, executor) -> None:
    for value in range(4):
        executor.submit(
            Tagged(value, tasks=[doubled(backend, elsewhere(value, 1)), doubled(backend, elsewhere(value))])
        )
        device.side.run()
        (job,) = executor.drain(10)
        assert results(job) == [[2.0 * value, 2.0], [2.0 * value]]
        del job
    assert len(device.memory) == 1


def test_a_buffer_is_not_written_to_while_a_sample_is_read_from_it(device, backend, executor) -> None:
    gate, read = threading.Event(), []

    def compute(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        assert gate.wait(10)
        read.append(tensor.tolist())
        return {}

    executor.submit(Tagged("slow", tasks=[Task(backend, (elsewhere(1),), compute)]))
    device.side.run()
    executor.poll()
    executor.submit(Tagged("next", tasks=[Task(backend, (elsewhere(2),), compute)]))
    device.side.run()
    gate.set()
    executor.drain(10)
    assert read == [[1.0], [2.0]]
    assert len(device.memory) == 2


def test_a_buffer_is_not_given_away_before_the_copy_into_it_is_done(device, backend) -> None:
    clock = iter(range(0, 1000, 10))
    executor: Executor[Tagged] = Executor(RuntimeConfig(timeout_seconds=1.0), clock=lambda: float(next(clock)))
    executor.submit(Tagged("given up", tasks=[doubled(backend, elsewhere(1))]))
    assert [job.state for job in executor.poll()] == ["abandoned"]
    executor.submit(Tagged("b", tasks=[doubled(backend, elsewhere(2))]))
    assert len(device.memory) == 2
    executor.close()


def test_the_allocator_is_told_of_every_tensor_that_is_copied(device, backend, executor) -> None:
    tensors = elsewhere(1), elsewhere(2)
    executor.submit(Tagged("a", tasks=[doubled(backend, *tensors)]))
    assert [id(tensor) for tensor in device.kept] == [*map(id, tensors)]


def test_the_worker_asks_the_device_for_nothing(device, backend, executor) -> None:
    for value in range(3):
        executor.submit(Tagged(value, tasks=[doubled(backend, elsewhere(value))]))
        device.side.run()
        executor.drain(10)
    assert device.threads == {threading.current_thread().name}


def test_a_graph_that_another_thread_records_while_the_worker_computes_is_kept(device, backend, executor) -> None:
    gate = threading.Event()

    def compute(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        assert gate.wait(10)
        return {"value": tensor + 1}

    executor.submit(Tagged("a", tasks=[Task(backend, (elsewhere(1),), compute)]))
    device.side.run()
    executor.poll()
    device.recording = "another thread"
    gate.set()
    wait_for_the_worker(executor)
    device.recording = None
    assert not device.is_lost
    assert results(executor.poll()[0]) == [[2.0]]


def test_a_graph_that_the_training_thread_records_is_kept_and_the_sample_waits(device, backend, executor) -> None:
    executor.submit(Tagged("before", tasks=[doubled(backend, elsewhere(1))]))
    device.side.run()
    device.recording = threading.current_thread().name
    assert executor.poll() == []
    executor.submit(Tagged("inside", tasks=[Task(backend, (elsewhere(1),), dict)]))
    assert not device.is_lost
    device.recording = None
    before, inside = executor.drain(10)
    assert results(before) == [[2.0]]
    assert "recorded into a CUDA graph" in inside.tasks[0].error


def test_no_host_memory_fails_the_sample_and_not_the_step(device, backend, executor, monkeypatch) -> None:
    def none_left(size: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device, "host_memory", none_left)
    assert executor.submit(Tagged("a", tasks=[doubled(backend, elsewhere(1))]))
    (job,) = executor.drain(10)
    assert isinstance(job.tasks[0].cause, torch.OutOfMemoryError)
    assert job.tasks[0].inputs == (), "what was captured would stay on the device"


def test_a_later_sample_of_another_device_waits_for_the_earlier_one(executor) -> None:
    slow, fast = SimulatedStreams(), SimulatedStreams()
    executor.submit(Tagged("first", tasks=[doubled(StreamBackend(slow), elsewhere(1))]))
    executor.submit(Tagged("second", tasks=[doubled(StreamBackend(fast), elsewhere(2))]))
    fast.side.run()
    assert executor.poll() == []
    slow.side.run()
    assert [job.tag for job in executor.drain(10)] == ["first", "second"]


def test_a_sample_of_two_devices_begins_when_both_copies_are_done(executor) -> None:
    one, other = SimulatedStreams(), SimulatedStreams()
    tasks = [doubled(StreamBackend(one), elsewhere(1)), doubled(StreamBackend(other), elsewhere(2))]
    executor.submit(Tagged("a", tasks=tasks))
    one.side.run()
    executor.poll()
    assert not executor._open[0].handed_over
    other.side.run()
    (job,) = executor.drain(10)
    assert results(job) == [[2.0], [4.0]]


def test_a_device_that_never_finishes_is_given_up(device, backend) -> None:
    clock = iter(range(0, 1000, 10))
    executor: Executor[Tagged] = Executor(RuntimeConfig(timeout_seconds=1.0), clock=lambda: float(next(clock)))
    executor.submit(Tagged("a", tasks=[doubled(backend, elsewhere(1))]))
    assert [job.state for job in executor.poll()] == ["abandoned"]
    assert not executor.stuck
    executor.close()


@pytest.mark.gpu
def test_a_sample_of_a_real_device_is_computed_on_the_host() -> None:
    from ess_monitor.runtime import backend_for

    backend = backend_for(torch.device("cuda"), threads=1)
    executor: Executor[Tagged] = Executor(RuntimeConfig())
    x = torch.randn(4, 64, 64, device="cuda")
    task = Task(backend, (x,), lambda given: {"s": torch.linalg.svdvals(given)}, (backend.ready(),))
    executor.submit(Tagged("a", tasks=[task]))
    assert task.inputs[0].is_pinned()
    (job,) = executor.drain(60)
    torch.testing.assert_close(job.tasks[0].results["s"], torch.linalg.svdvals(x.cpu()), atol=1e-4, rtol=1e-4)
    executor.close()


def test_a_gpu_of_apple_copies_in_its_one_stream_to_memory_that_is_not_pinned(monkeypatch, executor) -> None:
    only = SimulatedStream("the only one")
    empty = torch.empty

    class Event:
        def record(self) -> None:
            self.place = len(only.work)

        def query(self) -> bool:
            return only.done >= self.place

    class OnApple(Elsewhere):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is not torch.Tensor.copy_:
                return super().__torch_function__(function, types, args, kwargs)
            assert kwargs == {"non_blocking": True}
            host, tensor = (each.as_subclass(torch.Tensor) for each in args)
            only.work.append(lambda: host.copy_(tensor))
            return host

    def not_pinned(*sizes: int, **options: object) -> torch.Tensor:
        assert not options.get("pin_memory")
        return empty(*sizes, **options).fill_(255)

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("there is no other stream, and no module of the device with one")

    monkeypatch.setattr(torch.mps.event, "Event", Event)
    monkeypatch.setattr(torch, "empty", not_pinned)
    for name in ("Stream", "get_device_module"):
        monkeypatch.setattr(torch, name, refuse)
    backend = backend_for(torch.device("mps"), threads=1)
    given = torch.zeros(2).as_subclass(OnApple)
    only.work.append(lambda: given.as_subclass(torch.Tensor).fill_(3.0))
    task = doubled(backend, given)
    executor.submit(Tagged("a", tasks=[task]))
    only.run(1)
    assert executor.poll() == []
    assert not executor._todo
    assert {tensor.device.type for tensor in task.inputs} == {"cpu"}
    only.run()
    (job,) = executor.drain(10)
    assert results(job) == [[6.0, 6.0]]
