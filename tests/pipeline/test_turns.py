"""Time as a budget of whole runs: layers take turns, nothing is turned off, and readings say what was left out."""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from ess_monitor import Monitor, MonitorConfig
from ess_monitor.capture import CaptureSpec
from ess_monitor.capture.registry import add_spec
from ess_monitor.ess import DeltaRecurrence
from ess_monitor.records import Measurement, Reading
from ess_monitor.runtime import HostBackend

STATE = 128


class DeltaLayer(nn.Module):
    """Gives the keys and queries of a delta rule to whoever asks, and puts out something that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def delta_of(call: Any) -> DeltaRecurrence:
    batch, length, _ = call.output.shape
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(2, batch, 2, length, STATE, generator=generator)
    beta = torch.rand(batch, 2, length, generator=generator)
    return DeltaRecurrence(torch.zeros(1, 1, 1, 1), beta, nn.functional.normalize(keys, dim=-1), queries)


add_spec(
    DeltaLayer,
    CaptureSpec("DeltaRecurrence", delta_of, state_capacity=lambda layer: STATE, channels=lambda layer: 2),
)


class Collecting:
    name, inline = "collecting", True

    def __init__(self) -> None:
        self.measurements: list[Measurement] = []

    def start(self, run: Any, snapshot: Any) -> None: ...

    def export(self, measurement: Measurement) -> None:
        self.measurements.append(measurement)

    def close(self, status: str) -> None: ...

    @property
    def measured(self) -> list[list[str]]:
        """The layers that each sample measured."""
        return [[r.layer for r in each.readings if r.status == "ok"] for each in self.measurements]

    @property
    def readings(self) -> list[Reading]:
        return [reading for each in self.measurements for reading in each.readings]


def model(layers: int) -> nn.Module:
    return nn.Sequential(*(DeltaLayer() for _ in range(layers)))


def config(sample_seconds: float | None, **settings: Any) -> MonitorConfig:
    runtime = {"sample_seconds": sample_seconds}
    return MonitorConfig.load(
        environment=False, every_n_steps=4, overhead_budget_ratio=None, positions=1, runtime=runtime, **settings
    )


def train(monitor: Monitor, samples: int, *, length: int = 16) -> None:
    """Train until so many samples more have been taken and judged."""
    for _ in range(4 * samples):
        monitor.model(torch.ones(2, length, 4)).sum().backward()
        monitor.step()
        monitor.flush()


def standing(clock: float = 0.0) -> Callable[[torch.device], HostBackend]:
    """A backend whose clocks stand still: what is planned follows from shapes alone."""
    backend = HostBackend(clock=lambda: clock, wall_clock=lambda: clock)
    return lambda device: backend


@contextmanager
def busy(threads: int) -> Iterator[None]:
    """A training that fills the cores."""
    over = threading.Event()

    def work() -> None:
        x = torch.randn(256, 256)
        while not over.is_set():
            x = (x @ x).clamp(-1, 1)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        over.set()
        for worker in workers:
            worker.join()


def test_48_delta_layers_beside_a_training_that_fills_the_cores_take_turns_and_none_is_lost() -> None:
    sink, watched = Collecting(), model(48)
    with Monitor(watched, config(1.0), exporters=[sink]) as monitor, busy(2):
        samples = 0
        while len({name for names in sink.measured for name in names}) < 48:
            train(monitor, 1)
            samples += 1
            assert samples < 100
        snapshot = monitor.snapshot()
        readings = monitor.readings
    assert {reading.status for reading in sink.readings} == {"ok", "deferred"}
    assert snapshot.health.parts_off == snapshot.health.layers_off == ()
    assert snapshot.measurements_total["failed"] == snapshot.measurements_total["skipped"] == 0
    assert 0 < snapshot.layers_deferred < 48
    assert len(sink.measured[0]) < 48
    assert len(readings) == 48
    assert {reading.status for reading in readings} == {"ok"}, "a layer whose turn it is not keeps its last reading"
    why = {reading.message for reading in sink.readings if reading.status == "deferred"}
    assert why
    assert all("sample_seconds" in message for message in why)
    warnings = [warning for each in sink.measurements for warning in each.warnings]
    assert sum("take turns" in warning for warning in warnings) == 1


@pytest.mark.parametrize("ticks", [(0.0,), (5.0, 2.0), (0.0, 1e9), (0.0, math.nan), (0.0, math.inf)])
def test_a_clock_that_lies_turns_nothing_off_and_every_layer_is_measured(ticks: tuple[float, ...]) -> None:
    lies = itertools.cycle(ticks)
    backend = HostBackend(clock=lambda: next(lies), wall_clock=lambda: next(lies))
    sink = Collecting()
    with Monitor(model(6), config(0.05), exporters=[sink], backends=lambda device: backend) as monitor:
        train(monitor, 12)
        snapshot = monitor.snapshot()
    assert {name for names in sink.measured for name in names} == {str(k) for k in range(6)}
    assert snapshot.health.parts_off == snapshot.health.layers_off == ()
    assert {reading.status for reading in sink.readings} <= {"ok", "deferred"}
    assert snapshot.interval_steps == 4
    assert math.isfinite(snapshot.overhead_ratio)


def test_a_layer_that_alone_takes_too_long_says_what_was_left_out() -> None:
    sink = Collecting()
    with Monitor(model(1), config(0.0075), exporters=[sink], backends=standing()) as monitor:
        train(monitor, 1, length=64)
    [reading] = sink.readings
    assert reading.status == "ok"
    assert reading.operators == 1
    assert reading.length < 64
    assert "1 of 2 sequences, 1 of 2 heads" in reading.message
    assert f"the first {reading.length} of 64 tokens" in reading.message
    assert "sample_seconds" in reading.message


def test_without_a_limit_all_layers_are_measured_in_full() -> None:
    sink = Collecting()
    with Monitor(model(6), config(None), exporters=[sink]) as monitor:
        train(monitor, 1)
    assert sink.measured == [[str(k) for k in range(6)]]
    assert {(reading.operators, reading.message) for reading in sink.readings} == {(4, "")}


def test_a_resumed_run_in_lockstep_measures_the_layers_that_the_uninterrupted_one_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ess_monitor.runtime.turns.WALL_PER_CORE_SECOND", math.inf)
    settings = config(0.05, autopilot={"mode": "auto", "lag_steps": 2})
    whole, first, second = Collecting(), Collecting(), Collecting()
    with Monitor(model(7), settings, exporters=[whole], backends=standing()) as monitor:
        train(monitor, 10)
    interrupted = Monitor(model(7), settings, exporters=[first], backends=standing())
    with interrupted as monitor:
        train(monitor, 4)
        state = json.loads(json.dumps(monitor.state_dict()))
    monitor = Monitor(model(7), settings, exporters=[second], backends=standing())
    monitor.load_state_dict(state)
    with monitor:
        train(monitor, 6)
    assert whole.measured == first.measured + second.measured
    assert all(0 < len(names) < 7 for names in whole.measured)
