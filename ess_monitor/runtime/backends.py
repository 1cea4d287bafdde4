"""Runs a measurement beside the training, without making it wait.

    HostBackend     CPU tensors. The worker thread computes, with its own number of threads.
    StreamBackend   tensors of an accelerator. The worker thread *launches* on a low-priority side stream, which waits
                    for the event recorded behind the copies. Results go to pinned host memory, and the training thread
                    polls the event behind them with `query()`. The training thread cannot launch itself, because
                    `torch.linalg.svdvals` checks for convergence and so waits for its stream.

Both use torch's generic stream and event interface: `torch.get_device_module(device)` has the same names for cuda, xpu
and others. Tests replace it by a simulated one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ess_monitor import validation


class StreamEvent(Protocol):
    """Marks a point in a stream, with the part of torch's event interface that is used."""

    def query(self) -> bool:
        """Return whether everything recorded before it is done."""

    def record(self, stream: Any) -> None:
        """Mark the present end of `stream`."""

    def elapsed_time(self, end: Any) -> float:
        """Return the milliseconds from this event to `end`, both done."""


@dataclass(eq=False)
class Task:
    """Describes a computation on tensors of one device, and holds its results on their way to the host."""

    backend: ComputeBackend
    inputs: tuple[torch.Tensor, ...]
    compute: Callable[[], dict[str, torch.Tensor]]
    ready: Any = None
    """The moment when `inputs` are complete, as the backend tells it."""
    results: dict[str, torch.Tensor] | None = None
    """Host tensors; they hold the values once `has_results()`. None before the launch, and where it failed."""
    arrived: Callable[[], bool] = lambda: False
    cost_seconds: Callable[[], float] = lambda: 0.0
    """Returns the seconds the computation took; call it only once `has_results()`."""
    error: str = ""
    cause: BaseException | None = None
    """The exception behind `error`, without its traceback, whose frames would keep the tensors alive."""

    def has_results(self) -> bool:
        """Return whether the results are on the host."""
        return self.results is not None and self.arrived()


class ComputeBackend(Protocol):
    """Runs a computation on captured tensors beside the training."""

    def ready(self) -> Any:
        """Return a token for the moment when the copies made so far are complete. Called on the training thread."""

    def launch(self, task: Task) -> None:
        """Compute behind `task.ready` and start copying the results to the host. Called on the worker thread."""


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


class HostBackend:
    """Computes on the CPU, in the calling (worker) thread."""

    def __init__(self, *, threads: int = 1, clock: Callable[[], float] = time.thread_time) -> None:
        self._threads = validation.whole("threads", threads, 1, 2**16)
        self._clock = validation.function("clock", clock)
        self._calling_thread = threading.local()

    def ready(self) -> None:
        """Return None: copies on the host are complete when they return."""

    def launch(self, task: Task) -> None:
        """Compute now. The first call in a thread limits that thread's number of threads."""
        if not getattr(self._calling_thread, "is_limited", False):
            limit_this_thread(self._threads)
            self._calling_thread.is_limited = True
        started = self._clock()
        results = task.compute()
        seconds = (self._clock() - started) * self._threads
        task.arrived, task.cost_seconds = lambda: True, lambda: seconds
        task.results = results  # last: the training thread may look at any time


class Streams(Protocol):
    """Gives access to an accelerator's streams."""

    def side_stream(self) -> Any:
        """Return a new stream of low priority."""

    def current_stream(self) -> Any:
        """Return the stream that the calling thread launches on."""

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """Launch on `stream` inside the block."""

    def event(self) -> StreamEvent:
        """Return a new event that records times."""

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Start a pinned host copy on the current stream and return it without waiting."""

    def keep_until_done(self, tensor: torch.Tensor, stream: Any) -> None:
        """Keep this tensor's memory from being reused before `stream` has passed this point."""


class TorchStreams:
    """Implements `Streams` for a real device, through `torch.get_device_module`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)

    def side_stream(self) -> Any:
        # Priority 0 is torch's lowest. The training's own stream has it too; communication streams are above it.
        return self._module.Stream(device=self._device, priority=0)

    def current_stream(self) -> Any:
        return self._module.current_stream(self._device)

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._module.stream(stream)
        return context

    def event(self) -> StreamEvent:
        event: StreamEvent = self._module.Event(enable_timing=True)
        return event

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def keep_until_done(self, tensor: torch.Tensor, stream: Any) -> None:
        tensor.record_stream(stream)


class StreamBackend:
    """Computes on a side stream of an accelerator."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._side = streams.side_stream()

    def ready(self) -> StreamEvent:
        """Return an event behind the copies, on the stream that made them."""
        event = self._streams.event()
        event.record(self._streams.current_stream())
        return event

    def launch(self, task: Task) -> None:
        """Launch behind `task.ready` on the side stream; return without waiting for the results' copies."""
        side, streams = self._side, self._streams
        started, done = streams.event(), streams.event()
        side.wait_event(task.ready)
        with streams.use(side):
            for tensor in task.inputs:
                streams.keep_until_done(tensor, side)
            started.record(side)
            results = {name: streams.to_host(tensor) for name, tensor in task.compute().items()}
            done.record(side)
        task.arrived, task.cost_seconds = done.query, lambda: started.elapsed_time(done) / 1e3
        task.results = results  # last: the training thread may look at any time


def backend_for(device: torch.device, *, threads: int) -> ComputeBackend:
    """Return the backend for tensors of `device`; `threads` limits computations on the CPU."""
    validation.instance("device", device, torch.device, hint='torch.device("cpu")')
    if device.type in ("cpu", "meta"):
        return HostBackend(threads=threads)
    return StreamBackend(TorchStreams(device))
