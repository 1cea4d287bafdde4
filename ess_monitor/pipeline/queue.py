"""From what was captured to evidence: submit to the worker, and read what comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from ess_monitor.capture import Captured, CaptureFailure
from ess_monitor.config import MonitorConfig
from ess_monitor.errors import format_error
from ess_monitor.pipeline.counters import RunCounters
from ess_monitor.pipeline.health import Health
from ess_monitor.pipeline.readings import compute, lost_reading, positions_of, reading
from ess_monitor.records import MEASURED, Phase, Reading, SampleResult
from ess_monitor.runtime import ComputeBackend, Executor, Job, Task, is_out_of_memory


class MeasurementQueue:
    """The worker's side of a monitor, seen from the training thread."""

    def __init__(
        self,
        config: MonitorConfig,
        layers: tuple[str, ...],
        lane_of: Callable[[torch.device], ComputeBackend],
        ledger: RunCounters,
        health: Health,
        spent: Callable[[Phase, float], None],
    ) -> None:
        self._config = config
        self._layers = layers
        self._lane_of = lane_of
        self._ledger = ledger
        self._health = health
        self._spent = spent
        self._executor: Executor[Sample] = Executor(config.runtime)
        self._late = 0
        """Samples in a row that were given up."""

    def __len__(self) -> int:
        """Samples under way."""
        return len(self._executor)

    def submit(
        self,
        step: int,
        taken: tuple[Captured | CaptureFailure, ...],
        metrics: Metrics | None,
        asked: tuple[str, ...],
        share: float = 1.0,
    ) -> None:
        """Send one sampled step to the worker; one that finds the queue full is dropped and counted.

        Args:
            step: of the sample.
            taken: what the sampler gave.
            metrics: of the training loop.
            asked: layers that were to be taken.
            share: of their samples and heads.
        """
        failures = tuple(item for item in taken if isinstance(item, CaptureFailure))
        for failure in failures:
            self._health.guards["capture"].count(f"layer {failure.layer.name}: {failure.error}", failure.cause)
        lost = [lost_reading(step, failure.layer.name, "failed", failure.error) for failure in failures]
        seen = {item.layer.name for item in taken}
        unseen = "was not called in the sampled forward pass, or not by code that hooks can see"
        lost += [lost_reading(step, name, "failed", unseen) for name in asked if name not in seen]
        good = tuple(item for item in taken if isinstance(item, Captured))
        positions = tuple(positions_of(item, self._config.positions) for item in good)
        tasks = [self._task(*pair) for pair in zip(good, positions, strict=True)]
        numbers, tensors = split_metrics(metrics or {})
        if tensors:
            device = next(iter(tensors.values())).device
            tasks.append(Task(self._lane_of(device), tuple(tensors.values()), lambda: tensors))
        sample = Sample(step, good, positions, tuple(lost), numbers, share, failures)
        if not self._health.guards["measurement"].open or not self._executor.submit(sample, tasks):
            why = "the measurement queue was full; raise every_n_steps or runtime.queue_length"
            if self._executor.stuck:
                why = "the worker is still busy with an earlier sample, which was given up"
            self._ledger.measured("skipped", [lost_reading(step, item.layer.name, "dropped", why) for item in good])

    def poll(self) -> list[SampleResult]:
        """What is done or given up, oldest first; never waits."""
        return [self._read(job) for job in self._executor.poll()]

    def drain(self, timeout_seconds: float) -> list[SampleResult]:
        """Wait for everything under way."""
        return [self._read(job) for job in self._executor.drain(timeout_seconds)]

    def take(self, timeout_seconds: float | None = None) -> SampleResult | None:
        """Wait for the oldest sample, up to the runtime's timeout or a shorter one; None when nothing is under way."""
        longest = self._config.runtime.timeout_seconds
        job = self._executor.take(longest if timeout_seconds is None else min(timeout_seconds, longest))
        return None if job is None else self._read(job)

    def close(self, timeout_seconds: float) -> None:
        """End the worker; wait for its thread so long, and 2 s at most."""
        self._executor.close(min(2.0, timeout_seconds))

    def _task(self, captured: Captured, positions: tuple[int, ...]) -> Task:
        operator = captured.operator
        lane = self._lane_of(operator.device)
        return Task(lane, operator.tensors, lambda: compute(captured, positions, self._config.tolerance))

    def _read(self, job: Job[Sample]) -> SampleResult:
        cost = sum(task.launched.cost_seconds() for task in job.tasks if task.launched and task.launched.done())
        self._spent("measure", cost)
        self._count_late(job)
        evidence = read(job, self._layers, self._config.tolerance)
        said = self._diagnose_itself(job, evidence)
        readings = tuple(r.model_copy(update={"message": said.get(r.layer, r.message)}) for r in evidence.readings)
        return replace(evidence, readings=readings) if said else evidence

    def _count_late(self, job: Job[Sample]) -> None:
        """A sample that is given up may have held the training up, so after some in a row the worker is off."""
        if job.state != "abandoned":
            self._late = 0
            return
        self._late += 1
        guard = self._health.guards["worker"]
        guard.count(f"a sample was given up: {job.error}")
        if self._late >= guard.limit:
            guard.turn_off(
                f"{self._late} samples in a row were given up, the last because it was {job.error}. Take smaller ones "
                "(capture.samples, capture.heads, positions) or allow more time, and attach a new monitor to turn it "
                "on again."
            )

    def _diagnose_itself(self, job: Job[Sample], evidence: SampleResult) -> dict[str, str]:
        """Tell the monitor's health how this sample went; what is to be said of layers that are off now."""
        sample, portion = job.tag, self._health.portion
        causes: dict[str, BaseException | None] = {failure.layer.name: failure.cause for failure in sample.failures}
        for captured, task in zip(sample.taken, job.tasks, strict=False):
            causes[captured.layer.name] = task.cause
        failed = {r.layer: r.message for r in evidence.readings if r.status == "failed" and r.layer in causes}
        for captured in sample.taken:
            name = captured.layer.name
            if name in failed:
                self._health.guards["measurement"].count(f"layer {name}: {failed[name]}", causes[name])
        lacking = {name for name, cause in causes.items() if is_out_of_memory(cause)}
        measured = {r.layer for r in evidence.readings if r.status in MEASURED}
        if lacking:
            portion.record_out_of_memory(sample.share)
        elif measured:
            portion.record_success(sample.share)
        return self._health.layers_failed({k: v for k, v in failed.items() if k not in lacking}, measured)


Metrics = Mapping[str, "float | torch.Tensor"]


@dataclass(frozen=True)
class Sample:
    """One sampled step. The job's tasks are those of `taken`, in order, and perhaps one more for the metrics."""

    step: int
    taken: tuple[Captured, ...]
    positions: tuple[tuple[int, ...], ...]
    lost: tuple[Reading, ...]
    """Layers that could not be captured."""
    metrics: dict[str, float]
    """Metrics that were numbers already."""
    share: float = 1.0
    """Of the samples and heads that were to be taken."""
    failures: tuple[CaptureFailure, ...] = ()
    """Layers whose capture failed."""


def split_metrics(metrics: Metrics) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Numbers as they are; one-element tensors as detached copies that the runtime brings to the host.

    Anything else is no metric of a run and is left out.
    """
    numbers: dict[str, float] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, value in metrics.items():
        if isinstance(value, torch.Tensor):
            if value.numel() == 1:
                tensors[name] = value.detach().clone().reshape(())
        elif isinstance(value, (int, float)):
            numbers[name] = float(value)
    return numbers, tensors


def read(job: Job[Sample], layers: tuple[str, ...], tolerance: float) -> SampleResult:
    """What a finished job says: readings in the order of `layers`, and metrics."""
    sample, readings, metrics = job.tag, list(job.tag.lost), dict(job.tag.metrics)
    for captured, positions, task in zip(sample.taken, sample.positions, job.tasks, strict=False):
        name = captured.layer.name
        if job.state == "abandoned":
            readings.append(lost_reading(sample.step, name, "timed_out", job.error))
            continue
        error = task.error
        if task.launched is not None:
            try:
                readings.append(reading(sample.step, captured, positions, tolerance, task.launched.results))
                continue
            except Exception as problem:
                error = format_error(problem)
        readings.append(lost_reading(sample.step, name, "failed", error))
    for task in job.tasks[len(sample.taken) :]:
        if task.launched is not None and task.launched.done():
            metrics.update({name: float(value) for name, value in task.launched.results.items()})
    readings.sort(key=lambda r: layers.index(r.layer))
    broken = frozenset(name for name, value in metrics.items() if not math.isfinite(value))
    finite = {name: value for name, value in metrics.items() if name not in broken}
    return SampleResult(sample.step, tuple(readings), finite, broken)
