"""From what was captured to evidence: submit to the worker, and read what comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ess_monitor.capture import Captured, CaptureFailure
from ess_monitor.config import MonitorConfig
from ess_monitor.evidence import Evidence
from ess_monitor.ledger import Ledger
from ess_monitor.readings import compute, lost_reading, positions_of
from ess_monitor.records import Phase
from ess_monitor.runtime import Executor, Guard, Job, Lane, Task
from ess_monitor.samples import Metrics, Sample, read, split_metrics


class Measuring:
    """The worker's side of a monitor, seen from the training thread."""

    def __init__(
        self,
        config: MonitorConfig,
        layers: tuple[str, ...],
        lane_of: Callable[[torch.device], Lane],
        ledger: Ledger,
        guards: Mapping[str, Guard],
        spent: Callable[[Phase, float], None],
    ) -> None:
        self._config = config
        self._layers = layers
        self._lane_of = lane_of
        self._ledger = ledger
        self._guards = guards
        self._spent = spent
        self._executor: Executor[Sample] = Executor(config.runtime)

    def __len__(self) -> int:
        """Samples under way."""
        return len(self._executor)

    def submit(self, step: int, taken: tuple[Captured | CaptureFailure, ...], metrics: Metrics | None) -> None:
        """Send one sampled step to the worker; one that finds the queue full is dropped and counted."""
        lost = []
        for failure in (item for item in taken if isinstance(item, CaptureFailure)):
            self._guards["capture"].failed(f"layer {failure.layer.name}: {failure.error}")
            lost.append(lost_reading(step, failure.layer.name, "failed", failure.error))
        seen = {item.layer.name for item in taken}
        unseen = "was not called in the sampled forward pass, or not by code that hooks can see"
        lost += [lost_reading(step, name, "failed", unseen) for name in self._layers if name not in seen]
        good = tuple(item for item in taken if isinstance(item, Captured))
        positions = tuple(positions_of(item, self._config.positions) for item in good)
        tasks = [self._task(*pair) for pair in zip(good, positions, strict=True)]
        numbers, tensors = split_metrics(metrics or {})
        if tensors:
            device = next(iter(tensors.values())).device
            tasks.append(Task(self._lane_of(device), tuple(tensors.values()), lambda: tensors))
        sample = Sample(step, good, positions, tuple(lost), numbers)
        if not self._guards["measurement"].open or not self._executor.submit(sample, tasks):
            why = "the measurement queue was full; raise every_n_steps or runtime.queue_length"
            self._ledger.measured("skipped", [lost_reading(step, item.layer.name, "dropped", why) for item in good])

    def poll(self) -> list[Evidence]:
        """What is done or given up, oldest first; never waits."""
        return [self._read(job) for job in self._executor.poll()]

    def drain(self, timeout_seconds: float) -> list[Evidence]:
        """Wait for everything under way."""
        return [self._read(job) for job in self._executor.drain(timeout_seconds)]

    def take(self) -> Evidence | None:
        """Wait for the oldest sample, up to the runtime's timeout; None when nothing is under way."""
        job = self._executor.take(self._config.runtime.timeout_seconds)
        return None if job is None else self._read(job)

    def close(self) -> None:
        """End the worker."""
        self._executor.close()

    def _task(self, captured: Captured, positions: tuple[int, ...]) -> Task:
        operator = captured.operator
        lane = self._lane_of(operator.device)
        return Task(lane, operator.tensors, lambda: compute(captured, positions, self._config.tolerance))

    def _read(self, job: Job[Sample]) -> Evidence:
        cost = sum(task.launched.cost_seconds() for task in job.tasks if task.launched and task.launched.done())
        self._spent("measure", cost)
        return read(job, self._layers, self._config.tolerance)
