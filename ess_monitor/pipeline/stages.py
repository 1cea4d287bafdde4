"""Builds the stages of a run. They do not know each other; the monitor hands on what one gives and another takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from ess_monitor.distributed import StoreConsensus
from ess_monitor.distributed.ranks import consensus_of_the_run
from ess_monitor.interventions.remedy import GradScale
from ess_monitor.pipeline.context import RunContext
from ess_monitor.pipeline.queue import MeasurementQueue
from ess_monitor.pipeline.replays import Replays
from ess_monitor.pipeline.results import ResultHandler
from ess_monitor.pipeline.schedule import Immediate, Lockstep, Schedule
from ess_monitor.pipeline.trigger import SampleTrigger
from ess_monitor.records import Measurement
from ess_monitor.runtime import ComputeBackend, backend_for


class Stages(NamedTuple):
    """Holds the stages of one run."""

    trigger: SampleTrigger
    queue: MeasurementQueue
    schedule: Schedule
    replays: Replays
    results: ResultHandler


def build_stages(
    model: nn.Module,
    context: RunContext,
    *,
    locked: bool,
    world_size: int,
    agreement: StoreConsensus | None,
    grad_scale: GradScale,
    backends: Callable[[torch.device], ComputeBackend] | None,
    export: Callable[[Measurement], None],
) -> Stages:
    """Build the stages.

    Args:
        model: the watched model.
        context: of the run.
        locked: whether samples are judged at steps that are known beforehand.
        world_size: processes of the run.
        agreement: the exchange between the ranks; None builds one where it is needed.
        grad_scale: what the loss is multiplied with before backward.
        backends: gives the backend for the tensors of a device; None for those of `ess_monitor.runtime`.
        export: takes each measurement to the sinks.
    """
    acts, settings = context.config.autopilot.mode == "auto", context.config.distributed
    threads = context.config.runtime.threads
    backend_of = cache(backends or (lambda device: backend_for(device, threads=threads)))
    queue = MeasurementQueue(context, backend_of)
    schedule: Schedule = Immediate(context, queue)
    if locked:
        consensus = agreement or consensus_of_the_run(settings, world_size, acts=acts)
        schedule = Lockstep(context, queue, consensus)
    replays = Replays(
        model,
        context,
        alone=lambda: world_size > 1 and not schedule.exchanges,
        together=lambda: schedule.exchanges,
    )
    results = ResultHandler(context, grad_scale, export, replays.obstacles, replays.state_obstacles)
    return Stages(SampleTrigger(model, context, backend_of), queue, schedule, replays, results)
