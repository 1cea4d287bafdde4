"""Brings captured tensors to the host and computes with them there, without making the training wait.

    HostBackend     CPU tensors. They are where they have to be.
    StreamBackend   tensors of an accelerator. The training thread starts one copy of a sample on a side stream, behind
                    the events that mark the captured tensors, into one flat page-locked buffer. It polls the event
                    behind the copy with `query()` at later steps, and then gives the sample to the worker.

The worker thread computes on the CPU in both cases, with its own number of threads. It makes no call to the device: a
CUDA graph that another thread records at the time would be lost by one, and it would need a context of its own there.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from ess_monitor import validation

_ALIGNMENT = 64
"""Bytes: every tensor in a buffer begins at a multiple, whatever its dtype."""


class StreamEvent(Protocol):
    """Marks a point in a stream, with the part of torch's event interface that is used."""

    def query(self) -> bool:
        """Return whether everything recorded before it is done."""


@dataclass(eq=False)
class Task:
    """Describes a computation with tensors that are on their way to the host, and holds its results."""

    backend: ComputeBackend
    inputs: tuple[torch.Tensor, ...]
    """On their device; from `backend.begin` on the host, where they hold the values once `arrived()`."""
    compute: Callable[..., dict[str, torch.Tensor]]
    """Called with the inputs on the host."""
    ready: tuple[Any, ...] = ()
    """The moments from which `inputs` are complete, each as `backend.ready` gave it."""
    arrived: Callable[[], bool] = lambda: True
    """Returns whether the inputs are on the host. May ask the device: to be called on the training thread."""
    expected_seconds: float = 0.0
    """How long it is expected to take. 0: it takes nothing of the time of a sample."""
    begun: bool = False
    """Whether the worker has begun it. Where the time of a sample is over it never does."""
    results: dict[str, torch.Tensor] | None = None
    """Host tensors. None before the computation, and where it failed."""
    cost_seconds: float = 0.0
    """Processor time of the computation."""
    error: str = ""
    cause: BaseException | None = None
    """The exception behind `error`, without its traceback, whose frames would keep the tensors alive."""


class ComputeBackend(Protocol):
    """Runs a computation on captured tensors beside the training."""

    def ready(self) -> Any:
        """Return a token for this moment, from which copies made so far are complete. Called on the training thread."""

    def begin(self, tasks: Sequence[Task]) -> None:
        """Start to bring the inputs of one sample's tasks to the host. Called on the training thread."""

    def launch(self, task: Task) -> None:
        """Compute with inputs that have arrived. Called on the worker thread."""


_THREAD_COUNT_LOCK = threading.Lock()
"""Held while torch's number of threads for new threads is not the training's."""
if hasattr(os, "register_at_fork"):
    # Without this a child could start with the wrong number of threads, or with a lock that nobody will release.
    os.register_at_fork(
        before=_THREAD_COUNT_LOCK.acquire,
        after_in_parent=_THREAD_COUNT_LOCK.release,
        after_in_child=_THREAD_COUNT_LOCK.release,
    )


def limit_this_thread(threads: int) -> None:
    """Call `torch.set_num_threads` for the calling thread alone.

    torch keeps the number per thread, but it also keeps the last one that any thread has set, and gives it to each
    thread that asks or computes for the first time. A short-lived thread therefore reads that number before the change
    and sets it again after. It starts before the change, so that the wrong number lasts as briefly as possible.
    """
    has_read, changed = threading.Event(), threading.Event()

    def restore() -> None:
        before = torch.get_num_threads()
        has_read.set()
        changed.wait()
        torch.set_num_threads(before)

    # The first call in a thread takes over the number for new threads; a later one would undo the limit.
    torch.get_num_threads()
    with _THREAD_COUNT_LOCK:
        restoring = threading.Thread(target=restore, name="ess-monitor-threads", daemon=True)
        restoring.start()
        try:
            has_read.wait()
            torch.set_num_threads(threads)
        finally:
            changed.set()
            restoring.join()


_RESOLUTION_SECONDS = 0.05
"""Some clocks of threads advance in steps of 16 ms."""


def plausible_seconds(of_thread: float, of_wall: float) -> float:
    """Return the time of a core that a thread has had; the wall time where its clock is wrong, 0 where both are.

    >>> plausible_seconds(2.0, 3.0), plausible_seconds(-1.0, 3.0), plausible_seconds(1e9, 3.0)
    (2.0, 3.0, 3.0)
    """
    of_wall = of_wall if 0 < of_wall < math.inf else 0.0
    if 0 <= of_thread < math.inf and (of_thread <= of_wall + _RESOLUTION_SECONDS or not of_wall):
        return of_thread
    return of_wall


class HostBackend:
    """Computes on the CPU, in the calling (worker) thread.

    Args:
        threads: of the computation.
        clock: seconds of one core that this thread has had, so that other load on the machine does not count.
        wall_clock: seconds that have passed. A thread cannot have had more of a core.
    """

    def __init__(
        self,
        *,
        threads: int = 1,
        clock: Callable[[], float] = time.thread_time,
        wall_clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._threads = validation.whole("threads", threads, 1, 2**16)
        self._clock = validation.function("clock", clock)
        self._wall_clock = validation.function("wall_clock", wall_clock)
        self._calling_thread = threading.local()

    def ready(self) -> Any:
        """Return None: copies on the host are complete when they return."""
        return None

    def begin(self, tasks: Sequence[Task]) -> None:
        """Do nothing: the inputs are on the host."""

    def launch(self, task: Task) -> None:
        """Compute now. The first call in a thread limits that thread's number of threads."""
        if not getattr(self._calling_thread, "is_limited", False):
            limit_this_thread(self._threads)
            self._calling_thread.is_limited = True
        started, began = self._clock(), self._wall_clock()
        results = task.compute(*task.inputs)
        seconds = plausible_seconds(self._clock() - started, self._wall_clock() - began)
        task.cost_seconds = seconds * self._threads
        task.results = results  # last: the training thread may look at any time


class Streams(Protocol):
    """Gives access to an accelerator. Everything is called on the training thread."""

    def now(self) -> StreamEvent:
        """Return an event at the present end of the stream that the calling thread launches on."""

    def copying(self, after: Sequence[Any]) -> AbstractContextManager[Any]:
        """Inside the block, launch on a side stream, behind these events."""

    def host_memory(self, size: int) -> torch.Tensor:
        """Return that many bytes of page-locked host memory."""

    def copy(self, host: torch.Tensor, tensor: torch.Tensor) -> None:
        """Start a copy to host memory on the current stream, and keep the memory of `tensor` until it is done."""

    def is_capturing(self) -> bool:
        """Return whether the calling thread records a graph, in which nothing else may be asked of the device."""


class TorchStreams:
    """Implements `Streams` for a real device, through `torch.get_device_module`: cuda, xpu and others alike."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)
        # Priority 0 is torch's lowest. The training's own stream has it too; communication streams are above it.
        self._side = self._module.Stream(device=device, priority=0)
        self._is_capturing = getattr(self._module, "is_current_stream_capturing", lambda: False)

    def now(self) -> StreamEvent:
        event: StreamEvent = self._module.current_stream(self._device).record_event()
        return event

    def copying(self, after: Sequence[Any]) -> AbstractContextManager[Any]:
        for event in after:
            self._side.wait_event(event)
        context: AbstractContextManager[Any] = self._module.stream(self._side)
        return context

    def host_memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def copy(self, host: torch.Tensor, tensor: torch.Tensor) -> None:
        host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._side)

    def is_capturing(self) -> bool:
        return bool(self._is_capturing())


class MpsStreams:
    """Implements `Streams` for GPUs of Apple, whose one stream does everything in order, in memory of the host."""

    def now(self) -> StreamEvent:
        event: StreamEvent = torch.mps.event.Event()
        event.record()  # type: ignore[attr-defined]
        return event

    def copying(self, after: Sequence[Any]) -> AbstractContextManager[Any]:
        return nullcontext()

    def host_memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def copy(self, host: torch.Tensor, tensor: torch.Tensor) -> None:
        host.copy_(tensor, non_blocking=True)

    def is_capturing(self) -> bool:
        return False


class _Lease:
    """Held by the tasks whose inputs are in a buffer; the buffer is free when it is gone."""


@dataclass(eq=False)
class _Buffer:
    memory: torch.Tensor
    lease: weakref.ref[_Lease]
    written: StreamEvent | None = None
    """Behind the copies into it."""

    def is_free(self) -> bool:
        return self.lease() is None and (self.written is None or self.written.query())


class StreamBackend(HostBackend):
    """Brings the tensors of an accelerator to the host, and computes there as `HostBackend` does.

    Args:
        streams: of the device.
        threads, clock: those of `HostBackend`.
    """

    def __init__(self, streams: Streams, *, threads: int = 1, clock: Callable[[], float] = time.thread_time) -> None:
        super().__init__(threads=threads, clock=clock)
        self._streams = streams
        self._buffers: list[_Buffer] = []
        """Page-locked memory, used again from sample to sample: it takes milliseconds to come by."""

    def ready(self) -> StreamEvent:
        """Return an event behind the copies, on the stream that made them."""
        return self._streams.now()

    def begin(self, tasks: Sequence[Task]) -> None:
        """Start to copy all inputs into one buffer, on a side stream; return without waiting.

        Raises:
            RuntimeError: the step is being recorded into a graph, or there is no host memory.
        """
        streams = self._streams
        if streams.is_capturing():
            raise RuntimeError("the step is being recorded into a CUDA graph; call monitor.step() outside of it")
        sizes = [[_room(tensor) for tensor in task.inputs] for task in tasks]
        lease = _Lease()
        buffer = self._free_buffer(sum(map(sum, sizes)), lease)
        begin, on_host = 0, []
        with streams.copying([event for task in tasks for event in task.ready]):
            try:
                for task, rooms in zip(tasks, sizes, strict=True):
                    places = [begin := begin + room for room in (0, *rooms)]
                    on_host.append(tuple(map(partial(_place, buffer.memory), places, task.inputs)))
                    for host, tensor in zip(on_host[-1], task.inputs, strict=True):
                        copy = torch.Tensor.copy_ if tensor.device.type == "cpu" else streams.copy
                        copy(host, tensor)
            finally:
                buffer.written = streams.now()
        arrival = _Arrival(streams, buffer.written, lease)
        for task, task.inputs in zip(tasks, on_host, strict=True):
            task.arrived = arrival

    def _free_buffer(self, size: int, lease: _Lease) -> _Buffer:
        free = [buffer for buffer in self._buffers if buffer.is_free()]
        found = next((buffer for buffer in free if len(buffer.memory) >= size), None)
        if found is None:
            self._buffers = [buffer for buffer in self._buffers if buffer not in free]
            found = _Buffer(self._streams.host_memory(size), weakref.ref(lease))
            self._buffers.append(found)
        found.lease = weakref.ref(lease)
        return found


class _Arrival:
    """Tells whether the copies of a sample are done, without waiting for them."""

    def __init__(self, streams: Streams, written: StreamEvent, lease: _Lease) -> None:
        self._streams, self._written, self._lease = streams, written, lease
        self._is_done = False

    def __call__(self) -> bool:
        if not self._is_done and not self._streams.is_capturing():
            self._is_done = self._written.query()
        return self._is_done


def _room(tensor: torch.Tensor) -> int:
    """Return the bytes that a tensor takes in a buffer."""
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _place(memory: torch.Tensor, begin: int, like: torch.Tensor) -> torch.Tensor:
    """Return the part of a buffer for a tensor, with its shape and dtype."""
    return memory[begin : begin + like.nbytes].view(like.dtype).view(like.shape)


def backend_for(device: torch.device, *, threads: int) -> ComputeBackend:
    """Return the backend for tensors of `device`; `threads` limits its computations."""
    validation.instance("device", device, torch.device, hint='torch.device("cpu")')
    if device.type in ("cpu", "meta"):
        return HostBackend(threads=threads)
    streams = MpsStreams() if device.type == "mps" else TorchStreams(device)
    return StreamBackend(streams, threads=threads)
