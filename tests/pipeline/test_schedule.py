"""Who takes what when samples are judged in lockstep."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from torch.distributed import HashStore

from ess_monitor import CaptureError, Monitor, MonitorConfig
from ess_monitor.distributed import StoreConsensus
from ess_monitor.featurizers import GLA
from ess_monitor.interventions import AutopilotConfig
from ess_monitor.records import Measurement, RunInfo
from ess_monitor.runtime import Executor, Job, RuntimeConfig


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


def test_a_signal_handler_that_flushes_while_a_sample_is_read_does_not_judge_it_again(monkeypatch) -> None:
    model = GLA(16, 2)
    with Monitor(model, config()) as monitor:
        train(model, monitor, 5)
        flushed = []
        wait_for = Executor._wait_for

        def interrupted(self: Executor, *arguments: object, **named: object) -> None:
            monkeypatch.undo()
            wait_for(self, *arguments, **named)
            flushed.append(monitor.flush())

        monkeypatch.setattr(Executor, "_wait_for", interrupted)
        train(model, monitor, 2)
        assert flushed
        assert monitor.snapshot().measurements_total == {"ok": 2, "skipped": 0, "failed": 0}
        assert monitor.snapshot().health.part_failures_total["worker"] == 0
        train(model, monitor, 4)
        assert monitor.snapshot().measurements_total["ok"] == 3


def test_jobs_that_a_signal_handler_took_are_not_returned_twice() -> None:
    executor: Executor[Job] = Executor(RuntimeConfig(queue_length=3))
    taken: list[Job] = []

    class Interrupted(Job):
        def done(self) -> bool:
            if not taken:
                taken.append(self)
                taken.extend(executor.poll())
            return super().done()

    jobs = [Interrupted() for _ in range(3)]
    for job in jobs:
        executor.submit(job)
    for job in jobs:
        while not job.finished:
            time.sleep(0.001)
    found = executor.drain(30)
    assert [*taken[1:], *found] == jobs
    assert executor.take(1) is None
    executor.close()
