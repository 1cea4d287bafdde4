"""A training whose captured tensors travel as on an accelerator: the readings are those of tensors on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ess_monitor import CaptureConfig, Monitor, MonitorConfig
from ess_monitor.featurizers import Backbone, BackboneConfig
from ess_monitor.pipeline.context import Sample
from ess_monitor.runtime import HostBackend, StreamBackend, Task, backend_for
from tests.runtime.simulated import SimulatedStreams


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(16, 6), nn.LSTM(6, 6, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.mix(self.embed(tokens))[0]
        return output


def backbone(featurizer: str) -> nn.Module:
    return Backbone(BackboneConfig(vocab_size=16, width=16, depth=2, num_heads=2, featurizer=featurizer))


def readings(build: Callable[[], nn.Module], backend: HostBackend) -> dict[tuple[int, str], Any]:
    """Train for three samples; return every reading."""
    torch.manual_seed(0)
    model, found = build(), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    capture = CaptureConfig(unknown="jacobian", samples=2)
    config = MonitorConfig(every_n_steps=2, overhead_budget_ratio=None, capture=capture, positions=2)
    with Monitor(model, config, exporters=[], backends=lambda device: backend) as monitor:
        for _ in range(6):
            loss = model(torch.randint(0, 16, (3, 12))).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step({"loss": loss})
            found |= {(r.step, r.layer): r for r in monitor.flush()}
    return found


@pytest.mark.parametrize("build", [lambda: backbone("gla"), lambda: backbone("sa"), LSTM])
def test_readings_are_those_of_tensors_on_the_cpu(build: Callable[[], nn.Module]) -> None:
    streams = SimulatedStreams()
    assert (seen := readings(build, StreamBackend(streams))) == readings(build, HostBackend())
    assert len({step for step, _ in seen}) == 3
    assert {reading.status for reading in seen.values()} == {"ok"}
    assert len(streams.memory) <= 2, "one for the answers of the first sample's probe, one for all samples"
    assert not any("worker" in name for name in streams.threads)


def test_readings_on_a_gpu_of_apple_are_those_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def record(self) -> None: ...

        def query(self) -> bool:
            return True

    monkeypatch.setattr(torch.mps.event, "Event", Event)
    backend = backend_for(torch.device("mps"), threads=1)
    assert isinstance(backend, StreamBackend)
    seen = readings(lambda: backbone("gla"), backend)
    assert seen == readings(lambda: backbone("gla"), HostBackend())
    assert {reading.status for reading in seen.values()} == {"ok"}


def test_nothing_that_waits_for_the_worker_is_held_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[set[int]] = []
    begin = Sample.begin

    def noted(sample: Sample) -> None:
        before = {tensor.data_ptr() for task in sample.tasks for tensor in task.inputs}
        begin(sample)
        held = [tensor for item in sample.captured for tensor in item.operator.tensors]
        held += [tensor for item in sample.captured for tensor in (claim.holds for claim in item.claims)]
        held += [tensor for task in sample.tasks for tensor in task.inputs]
        captured.append(before & {tensor.data_ptr() for tensor in held})

    monkeypatch.setattr(Sample, "begin", noted)
    readings(lambda: backbone("gla"), StreamBackend(SimulatedStreams()))
    assert captured == [set()] * 3


def test_the_copy_waits_for_the_forward_pass_and_not_for_the_rest_of_the_step() -> None:
    """Its event is recorded right at the copies, in the forward pass."""
    streams, model = SimulatedStreams(), backbone("gla")
    config = MonitorConfig(every_n_steps=1, overhead_budget_ratio=None)
    with Monitor(model, config, exporters=[], backends=lambda device: StreamBackend(streams)) as monitor:
        for _ in range(2):  # the first sample also looks at how the model mixes tokens
            streams.side.waits.clear()
            loss, forward = model(torch.randint(0, 16, (3, 12))).square().mean(), len(streams.main.work)
            streams.main.work.append(lambda: None)  # the backward pass
            loss.backward()
            monitor.step()
            places = [event.place for _, event in streams.side.waits]
            streams.main.run()
            assert {reading.status for reading in monitor.flush()} == {"ok"}
    assert places == [forward, forward], "one for each layer"


class OnADevice(torch.Tensor):
    """A number of another device than the model's."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 1)


@pytest.mark.parametrize("order", [("loss", "accuracy"), ("accuracy", "loss")])
def test_metrics_of_two_devices_travel_apart_and_arrive_together(order: tuple[str, str]) -> None:
    streams, model = SimulatedStreams(), backbone("gla")
    given = {"loss": torch.tensor(0.25).as_subclass(OnADevice), "accuracy": torch.tensor(0.5)}

    class Refusing(HostBackend):
        def begin(self, tasks: Sequence[Task]) -> None:
            assert not any(isinstance(tensor, OnADevice) for task in tasks for tensor in task.inputs)

    class Noting(StreamBackend):
        def begin(self, tasks: Sequence[Task]) -> None:
            assert all(isinstance(tensor, OnADevice) for task in tasks for tensor in task.inputs)
            super().begin(tasks)

    def backend_of(device: torch.device) -> HostBackend:
        return Noting(streams) if device.type == "cuda" else Refusing()

    found: list[dict[str, float]] = []
    kept = SimpleNamespace(
        name="kept", inline=True, start=lambda run, snapshot: None, close=lambda status: None,
        export=lambda measurement: found.append(dict(measurement.metrics)),
    )  # fmt: skip
    with Monitor(model, MonitorConfig(every_n_steps=1), exporters=[kept], backends=backend_of) as monitor:
        model(torch.randint(0, 16, (3, 12))).square().mean().backward()
        monitor.step({name: given[name] for name in order})
        streams.main.run()
        streams.side.run()
        monitor.flush()
    assert found == [{"loss": 0.25, "accuracy": 0.5}]
    assert len(streams.kept) == 1
