"""What travels through the executor with the tasks of a sampled step, and how it is read at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ess_monitor.capture import Captured, CaptureFailure
from ess_monitor.errors import described
from ess_monitor.evidence import Evidence
from ess_monitor.readings import lost_reading, reading
from ess_monitor.records import Reading
from ess_monitor.runtime import Job

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


def read(job: Job[Sample], layers: tuple[str, ...], tolerance: float) -> Evidence:
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
                error = described(problem)
        readings.append(lost_reading(sample.step, name, "failed", error))
    for task in job.tasks[len(sample.taken) :]:
        if task.launched is not None and task.launched.done():
            metrics.update({name: float(value) for name, value in task.launched.results.items()})
    readings.sort(key=lambda r: layers.index(r.layer))
    broken = frozenset(name for name, value in metrics.items() if not math.isfinite(value))
    finite = {name: value for name, value in metrics.items() if name not in broken}
    return Evidence(sample.step, tuple(readings), finite, broken)
