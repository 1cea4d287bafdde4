"""A device that computes nothing by itself: streams advance only when a test says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ess_monitor.runtime import Job


class SimulatedEvent:
    def __init__(self, device: SimulatedStreams) -> None:
        self.device = device
        self.stream: SimulatedStream | None = None
        self.place = 0

    def record(self, stream: SimulatedStream) -> None:
        self.stream, self.place = stream, len(stream.work)

    def query(self) -> bool:
        assert self.stream is not None, "an event that was never recorded says nothing"
        return self.stream.done >= self.place

    def elapsed_time(self, end: SimulatedEvent) -> float:
        assert self.query(), "elapsed_time of unfinished events is an error on a real device"
        assert end.query()
        return 2.0


class SimulatedStream:
    """Work is queued in `work`; `run(n)` does the next n pieces, each only if the events it waits for are done."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.work: list[Any] = []
        self.done = 0
        self.waits: list[tuple[int, SimulatedEvent]] = []

    def wait_event(self, event: SimulatedEvent) -> None:
        self.waits.append((len(self.work), event))

    def run(self, pieces: int | None = None) -> None:
        end = len(self.work) if pieces is None else min(len(self.work), self.done + pieces)
        while self.done < end:
            blocked = [e for place, e in self.waits if place <= self.done and not e.query()]
            if blocked:
                return
            self.work[self.done]()
            self.done += 1


class SimulatedStreams:
    """The `Streams` interface over simulated streams; host copies hold garbage until their stream has run them."""

    def __init__(self) -> None:
        self.main = SimulatedStream("main")
        self.side: list[SimulatedStream] = []
        self.active: list[SimulatedStream] = [self.main]
        self.kept: list[tuple[torch.Tensor, SimulatedStream]] = []

    def side_stream(self) -> SimulatedStream:
        self.side.append(SimulatedStream(f"side{len(self.side)}"))
        return self.side[-1]

    def current_stream(self) -> SimulatedStream:
        return self.main

    @contextmanager
    def use(self, stream: SimulatedStream) -> Iterator[None]:
        self.active.append(stream)
        yield
        self.active.pop()

    def event(self) -> SimulatedEvent:
        return SimulatedEvent(self)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.full_like(tensor, float("nan"))
        self.active[-1].work.append(lambda: host.copy_(tensor))
        return host

    def keep_until_done(self, tensor: torch.Tensor, stream: SimulatedStream) -> None:
        self.kept.append((tensor, stream))


@dataclass(eq=False)
class Tagged(Job):
    """A job that a test can tell from others."""

    tag: object
