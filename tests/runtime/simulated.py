"""A device that computes nothing by itself: streams advance only when a test says so."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ess_monitor.runtime import Job


class SimulatedEvent:
    def __init__(self, device: SimulatedStreams, stream: SimulatedStream) -> None:
        self.device, self.stream, self.place = device, stream, len(stream.work)

    def query(self) -> bool:
        self.device.is_asked()
        return self.is_done

    @property
    def is_done(self) -> bool:
        return self.stream.done >= self.place


class SimulatedStream:
    """Work is queued in `work`; `run(n)` does the next n pieces, each only if the events it waits for are done."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.work: list[Any] = []
        self.done = 0
        self.waits: list[tuple[int, SimulatedEvent]] = []

    def run(self, pieces: int | None = None) -> None:
        end = len(self.work) if pieces is None else min(len(self.work), self.done + pieces)
        while self.done < end:
            blocked = [e for place, e in self.waits if place <= self.done and not e.is_done]
            if blocked:
                return
            self.work[self.done]()
            self.done += 1


class SimulatedStreams:
    """The `Streams` interface over simulated streams; host memory holds garbage until the copies into it have run."""

    def __init__(self) -> None:
        self.main, self.side = SimulatedStream("main"), SimulatedStream("side")
        self.active: list[SimulatedStream] = [self.main]
        self.kept: list[torch.Tensor] = []
        self.memory: list[torch.Tensor] = []
        self.threads: set[str] = set()
        """Names of the threads that made a call."""
        self.recording: str | None = None
        """Name of the thread that records a graph. One call of any thread to the device loses it."""
        self.is_lost = False

    def is_asked(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.is_lost |= self.recording is not None

    def now(self) -> SimulatedEvent:
        self.is_asked()
        return SimulatedEvent(self, self.active[-1])

    @contextmanager
    def copying(self, after: Sequence[Any]) -> Iterator[None]:
        self.is_asked()
        self.side.waits += [(len(self.side.work), event) for event in after]
        with self.on(self.side):
            yield

    @contextmanager
    def on(self, stream: SimulatedStream) -> Iterator[None]:
        self.active.append(stream)
        yield
        self.active.pop()

    def host_memory(self, size: int) -> torch.Tensor:
        self.is_asked()
        self.memory.append(torch.full((size,), 255, dtype=torch.uint8))  # NaN in every floating dtype
        return self.memory[-1]

    def copy(self, host: torch.Tensor, tensor: torch.Tensor) -> None:
        self.is_asked()
        self.kept.append(tensor)
        self.active[-1].work.append(lambda: host.copy_(tensor))

    def is_capturing(self) -> bool:
        return self.recording == threading.current_thread().name


@dataclass(eq=False)
class Tagged(Job):
    """A job that a test can tell from others."""

    tag: object
