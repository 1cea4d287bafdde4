"""Who takes what when samples are judged in lockstep."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed import HashStore

from ess_monitor import CaptureError, Monitor, MonitorConfig
from ess_monitor.distributed import StoreConsensus
from ess_monitor.featurizers import GLA


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
