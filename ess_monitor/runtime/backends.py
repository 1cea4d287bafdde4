"""Where a measurement runs beside the training.

A lane brings a computation to the captured tensors without making the training wait:

    HostBackend     CPU tensors. The worker thread computes, with its own number of threads.
    StreamBackend   tensors of an accelerator. The worker thread *launches* on a low-priority side stream, which waits
                 for the event recorded behind the copies; results go to pinned host memory; an event behind them is
                 polled with `query()` by the training thread. The launch is not on the training thread because
                 `torch.linalg.svdvals` checks for convergence and so waits for its stream.

Both are written against torch's generic stream and event interface (`torch.get_device_module(device)` has the same
names for cuda, xpu and others), which tests replace by a simulated one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ess_monitor import validation

Tensors = Iterable[torch.Tensor]


class Event(Protocol):
    """The part of torch's events that is used."""

    def query(self) -> bool:
        """True when everything recorded before it is done."""

    def record(self, stream: Any) -> None:
        """Mark the present end of `stream`."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this event to `end`, both done."""


@dataclass(frozen=True)
class Launched:
    """Results on their way to the host."""

    results: dict[str, torch.Tensor]
    """Host tensors; they hold the values once `done()`."""
    done: Callable[[], bool]
    cost_seconds: Callable[[], float]
    """What the computation took; asked only after `done()`."""


class ComputeBackend(Protocol):
    """Runs a computation on captured tensors beside the training."""

    def ready(self) -> Any:
        """On the training thread, behind the copies: a token for the moment at which they are complete."""

    def launch(self, ready: Any, inputs: Tensors, compute: Callable[[], dict[str, torch.Tensor]]) -> Launched:
        """On the worker thread: run `compute` and start the way of its results to the host."""


_LIMITING = threading.Lock()
"""Held while torch's number of threads for new threads is not the training's."""
if hasattr(os, "register_at_fork"):
    # A child begins neither in that moment, with the wrong number, nor with a lock that nobody will release.
    os.register_at_fork(before=_LIMITING.acquire, after_in_parent=_LIMITING.release, after_in_child=_LIMITING.release)


def limit_this_thread(threads: int) -> None:
    """`torch.set_num_threads` for the calling thread alone.

    torch keeps the number per thread, but it also keeps the last one that any thread has set, and gives it to each
    thread that asks or computes for the first time. A thread that ends at once therefore reads that number before and
    sets it again after; it is there already, so that the time between is as short as it can be.
    """
    read, limited = threading.Event(), threading.Event()

    def restore() -> None:
        before = torch.get_num_threads()
        read.set()
        limited.wait()
        torch.set_num_threads(before)

    # The first call in a thread takes over the number for new threads; a later one would undo the limit.
    torch.get_num_threads()
    with _LIMITING:
        restoring = threading.Thread(target=restore, name="ess-monitor-threads", daemon=True)
        restoring.start()
        try:
            read.wait()
            torch.set_num_threads(threads)
        finally:
            limited.set()
            restoring.join()


class HostBackend:
    """Computes in the calling (worker) thread."""

    def __init__(self, *, threads: int = 1, clock: Callable[[], float] = time.thread_time) -> None:
        self._threads = validation.whole("threads", threads, 1, 2**16)
        self._clock = validation.function("clock", clock)
        self._limited = threading.local()

    def ready(self) -> None:
        """Copies on the host are complete when they return."""

    def launch(self, ready: Any, inputs: Tensors, compute: Callable[[], dict[str, torch.Tensor]]) -> Launched:
        """Compute now. The thread limit is that of this thread alone, and set in its first call."""
        if not getattr(self._limited, "done", False):
            limit_this_thread(self._threads)
            self._limited.done = True
        started = self._clock()
        results = compute()
        seconds = (self._clock() - started) * self._threads
        return Launched(results, lambda: True, lambda: seconds)


class Streams(Protocol):
    """An accelerator's streams, as `TorchStreams` has them and tests simulate them."""

    def side_stream(self) -> Any:
        """A new stream of low priority."""

    def current_stream(self) -> Any:
        """The stream the calling thread launches on."""

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """Launch on `stream` inside the block."""

    def event(self) -> Event:
        """A new event that records times."""

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A pinned host copy, started on the current stream and not waited for."""

    def keep_until_done(self, tensor: torch.Tensor, stream: Any) -> None:
        """Do not reuse this tensor's memory before `stream` has passed this point."""


class TorchStreams:
    """`Streams` of a real device, through `torch.get_device_module`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)

    def side_stream(self) -> Any:
        """Priority 0 is the lowest that torch has; the training's own stream has it too, streams of kernels that matter
        (communication) are above it."""
        return self._module.Stream(device=self._device, priority=0)

    def current_stream(self) -> Any:
        """The training's stream, when called on the training thread."""
        return self._module.current_stream(self._device)

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """`with torch.cuda.stream(stream)`, for whichever device module it is."""
        context: AbstractContextManager[Any] = self._module.stream(stream)
        return context

    def event(self) -> Event:
        """An event with timing, so that the cost can be read from the device's own clock."""
        event: Event = self._module.Event(enable_timing=True)
        return event

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Pinned, so that the copy does not make the host wait."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def keep_until_done(self, tensor: torch.Tensor, stream: Any) -> None:
        """Tell the caching allocator about the second stream that reads this tensor."""
        tensor.record_stream(stream)


class StreamBackend:
    """Computes on a side stream of an accelerator."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._side = streams.side_stream()

    def ready(self) -> Event:
        """An event behind the copies, on the stream that made them."""
        event = self._streams.event()
        event.record(self._streams.current_stream())
        return event

    def launch(self, ready: Any, inputs: Tensors, compute: Callable[[], dict[str, torch.Tensor]]) -> Launched:
        """Launch behind `ready` on the side stream; return without waiting for the results' copies."""
        side, streams = self._side, self._streams
        started, done = streams.event(), streams.event()
        side.wait_event(ready)
        with streams.use(side):
            for tensor in inputs:
                streams.keep_until_done(tensor, side)
            started.record(side)
            results = {name: streams.to_host(tensor) for name, tensor in compute().items()}
            done.record(side)
        return Launched(results, done.query, lambda: started.elapsed_time(done) / 1e3)


def backend_for(device: torch.device, *, threads: int) -> ComputeBackend:
    """The lane for tensors of `device`."""
    validation.instance("device", device, torch.device, hint='torch.device("cpu")')
    if device.type in ("cpu", "meta"):
        return HostBackend(threads=threads)
    return StreamBackend(TorchStreams(device))
