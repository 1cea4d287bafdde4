"""Who takes what when samples are judged in lockstep."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed import HashStore

from ess_monitor import CaptureError, Monitor, MonitorConfig
from ess_monitor.distributed import StoreConsensus
from ess_monitor.featurizers import GLA
from ess_monitor.interventions import AutopilotConfig
from ess_monitor.records import Measurement, RunInfo


def config() -> MonitorConfig:
    settings = {"every_n_steps": 4, "overhead_budget_ratio": None, "autopilot": {"mode": "auto", "lag_steps": 2}}
    return MonitorConfig.load(environment=False, **settings)


def train(model: nn.Module, monitor: Monitor, steps: int) -> None:
    for _ in range(steps):
        model(torch.randn(2, 16, 16)).sum().backward()
        monitor.step()


def test_a_rank_that_only_followed_measures_alone_once_the_exchange_is_off() -> None:
    consensus = StoreConsensus(HashStore(), 1, 2, measuring=[0], limit_seconds=0.01)
    model = GLA(16, 2)
    with Monitor(model, config(), agreement=consensus) as monitor:
        train(model, monitor, 20)  # rank 0 never answers: after three skips in a row the exchange is off
        assert consensus.off
        train(model, monitor, 12)
        assert {reading.status for reading in monitor.readings} == {"ok"}


def test_capture_that_fails_at_every_sample_turns_itself_off_beside_an_exchange(monkeypatch) -> None:
    def refuse(self: object) -> None:
        raise CaptureError("no hooks here")

    monkeypatch.setattr("ess_monitor.capture.sampler.Sampler.arm", refuse)
    model = GLA(16, 2)
    with Monitor(model, config(), agreement=StoreConsensus(HashStore(), 0, 1)) as monitor:
        train(model, monitor, 40)
        assert monitor.snapshot().health.parts_off == ("capture",)
        assert monitor.snapshot().health.part_failures_total["capture"] == 5


class Started:
    """Keeps the first step that exporters are told, and the steps they get."""

    name, inline = "started", True

    def __init__(self) -> None:
        self.first_steps: list[int] = []
        self.steps: list[int] = []

    def start(self, run: RunInfo, snapshot: object) -> None:
        self.first_steps.append(run.first_step)

    def export(self, measurement: Measurement) -> None:
        self.steps.append(measurement.step)

    def close(self, status: str) -> None: ...


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_exporters_are_told_the_lowest_step_that_a_resumed_run_may_measure(mode: str) -> None:
    """In lockstep the sample of step 4 is judged at step 6, and is part of a state of step 5."""
    settings = config().model_copy(update={"autopilot": AutopilotConfig(mode=mode, lag_steps=2)})
    first, second = Started(), Started()
    model = GLA(16, 2)
    with Monitor(model, settings, exporters=[first]) as monitor:
        train(model, monitor, 5)
        state = monitor.state_dict()
    resumed = Monitor(model, settings, exporters=[second])
    resumed.load_state_dict(state)
    with resumed:
        train(model, resumed, 5)
        resumed.flush()
    assert first.first_steps == [0]
    assert second.first_steps == [4 if mode == "auto" else 5]
    assert second.steps == ([4, 8] if mode == "auto" else [8])
