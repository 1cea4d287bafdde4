"""From a captured sample to its readings: submit it to the worker, and read what comes back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from ess_monitor.capture import Captured
from ess_monitor.capture.causality.claims import refuted
from ess_monitor.errors import format_error
from ess_monitor.pipeline.context import Metrics, RunContext, Sample, tensors_of
from ess_monitor.pipeline.readings import compute, lost_reading, reading, undecayed_size
from ess_monitor.records import MEASURED, SampleResult, Status
from ess_monitor.runtime import ComputeBackend, Executor, Task, is_out_of_memory

_TIME_IS_OVER = (
    "the time of this sample was over before it was measured (runtime.sample_seconds, or a layer before it was given "
    "up); it comes first in the next"
)


class MeasurementQueue:
    """Submits samples to the worker and reads their results, on the training thread.

    Args:
        context: of the run.
        backend_of: gives the backend for the tensors of a device.
    """

    def __init__(self, context: RunContext, backend_of: Callable[[torch.device], ComputeBackend]) -> None:
        self._context = context
        self._config, self._health, self._guards = context.config, context.health, context.guards
        self._backend_of = backend_of
        self._executor: Executor[Sample] = Executor(context.config.runtime)
        self._turns = context.turns

    def __len__(self) -> int:
        """Samples under way."""
        return len(self._executor)

    def submit(self, sample: Sample, metrics: Metrics | None) -> None:
        """Send a sample to the worker. One that finds the queue full is dropped and counted."""
        self._health.skip({lost.layer.name: lost.error for lost in sample.failures if lost.status == "skipped"})
        for failure in sample.failures:
            if failure.status not in ("skipped", "deferred"):
                self._guards["capture"].count(f"layer {failure.layer.name}: {failure.error}", failure.cause)
        # Where the time is over before all are measured, those that have waited longest are done.
        captured = {item.layer.name: item for item in sample.captured}
        sample.captured = tuple(self._for_retention(captured[name]) for name in self._turns.in_turn(captured))
        sample.tasks = [self._task(item) for item in sample.captured]
        sample.metrics, tensors = self._context.metrics.read(metrics)
        for device, values in tensors.items():
            backend, named = self._backend_of(device), partial(_named, tuple(values))
            sample.tasks.append(Task(backend, tuple(values.values()), named, (backend.ready(),)))
        if not self._guards["measurement"].open or not self._executor.submit(sample):
            why = "the measurement queue was full; raise every_n_steps or runtime.queue_length"
            if self._executor.stuck:
                why = "the worker is still busy with an earlier sample, which was given up"
            dropped = [lost_reading(sample.step, item.layer.name, "dropped", why) for item in sample.captured]
            self._context.counters.measured("skipped", dropped)
            for item in sample.captured:
                self._note_undecayed(item, sample.step, None)
            for given in (sample.metrics, *tensors.values()):
                self._context.metrics.keep(given)
        else:
            self._turns.begin(sample.step, captured)

    def poll(self) -> list[SampleResult]:
        """Return the samples that are done or given up, oldest first; never waits."""
        return [self._finish(sample) for sample in self._executor.poll()]

    def drain(self, timeout_seconds: float) -> list[SampleResult]:
        """Wait for every sample under way, and return them."""
        return [self._finish(sample) for sample in self._executor.drain(timeout_seconds)]

    def take(self, timeout_seconds: float | None = None) -> SampleResult | None:
        """Wait for the oldest sample, up to the runtime's timeout for each layer, or a time for all of them.

        None when nothing is under way.
        """
        sample = self._executor.take(timeout_seconds)
        return None if sample is None else self._finish(sample)

    def close(self, timeout_seconds: float) -> None:
        """End the worker; wait for its thread so long, and 2 s at most."""
        self._executor.close(min(2.0, timeout_seconds))

    def _for_retention(self, captured: Captured) -> Captured:
        """Return what is measured of a layer whose operator with A := I may not be looked at in this sample."""
        name = captured.layer.name
        if self._context.undecayed.begin(name, always=self._turns.is_preferred(name)):
            return captured
        shape = None if captured.shape is None else replace(captured.shape, with_retention=False)
        return replace(captured, with_retention=False, shape=shape)

    def _note_undecayed(self, captured: Captured, step: int, results: dict[str, torch.Tensor] | None) -> None:
        if captured.with_retention:
            size = None if results is None else undecayed_size(results)
            self._context.undecayed.end(captured.layer.name, step, size)

    def _task(self, captured: Captured) -> Task:
        backend = self._backend_of(captured.operator.device)
        expected = self._turns.expected_seconds(captured.layer.name)
        return Task(backend, tensors_of(captured), self._compute, captured.ready, expected_seconds=expected)

    def _compute(self, captured: Captured, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Measure a layer whose tensors are `inputs`, on the worker thread."""
        config = self._config
        return compute(captured, config.positions, config.tolerance, config.tolerance_scale, config.modulation)

    def _finish(self, sample: Sample) -> SampleResult:
        cost = sum(task.cost_seconds for task in sample.tasks)
        self._context.charge("measure", cost + sample.lost_seconds)
        self._turns.end(sample.step)
        if sample.state == "abandoned":
            self._guards["worker"].count(f"a sample was given up: {sample.error}")
        result = replace(self._read(sample), slowness=_slowness(sample))
        off = self._report_health(sample, result)
        readings = tuple(r.model_copy(update={"message": off.get(r.layer, r.message)}) for r in result.readings)
        return replace(result, readings=readings) if off else result

    def _read(self, sample: Sample) -> SampleResult:
        """Return the readings of a sample in model order, and its metrics."""
        lost = (*sample.failures, *sample.unread)
        readings = [lost_reading(sample.step, item.layer.name, item.status, item.error) for item in lost]
        for captured, task in zip(sample.captured, sample.tasks, strict=False):
            name, error = captured.layer.name, task.error
            self._note_undecayed(captured, sample.step, task.results)
            if task.results is None and not error:
                status: Status = "timed_out" if task.begun else "deferred"
                readings.append(lost_reading(sample.step, name, status, sample.error if task.begun else _TIME_IS_OVER))
                continue
            if task.results is not None and (reason := refuted(captured.claims, task.results)):
                readings.append(lost_reading(sample.step, name, "skipped", reason))
                continue
            if task.results is not None:
                try:
                    config = self._config
                    scale, modulation = config.tolerance_scale, config.modulation
                    last = None if captured.with_retention else self._context.undecayed.last(name)
                    found = reading(
                        sample.step, captured, config.tolerance, task.results, scale, modulation, undecayed=last
                    )
                    readings.append(found)
                    continue
                except Exception as problem:
                    error = format_error(problem)
            readings.append(lost_reading(sample.step, name, "failed", error))
        metrics = dict(sample.metrics)
        for task in sample.tasks[len(sample.captured) :]:
            if task.results is not None:
                metrics.update({name: float(value) for name, value in task.results.items()})
        readings.sort(key=lambda r: self._context.layer_names.index(r.layer))
        nonfinite = frozenset(name for name, value in metrics.items() if not math.isfinite(value))
        finite = {name: value for name, value in metrics.items() if name not in nonfinite}
        return SampleResult(sample.step, tuple(readings), finite, nonfinite, changes=sample.changes)

    def _report_health(self, sample: Sample, result: SampleResult) -> dict[str, str]:
        """Tell the monitor's health how this sample went; return the messages of layers that are off from now on."""
        backoff = self._health.backoff
        causes: dict[str, BaseException | None] = {failure.layer.name: failure.cause for failure in sample.failures}
        for captured, task in zip(sample.captured, sample.tasks, strict=False):
            causes[captured.layer.name] = task.cause
        failed = {r.layer: r.message for r in result.readings if r.status == "failed" and r.layer in causes}
        for captured in sample.captured:
            name = captured.layer.name
            if name in failed:
                self._guards["measurement"].count(f"layer {name}: {failed[name]}", causes[name])
        out_of_memory = {name for name, cause in causes.items() if is_out_of_memory(cause)}
        measured = {r.layer for r in result.readings if r.status in MEASURED}
        self._health.skip({r.layer: r.message for r in result.readings if r.status == "skipped"})
        if out_of_memory:
            backoff.record_out_of_memory(sample.share)
        elif measured:
            backoff.record_success(sample.share)
        return self._health.layers_failed({k: v for k, v in failed.items() if k not in out_of_memory}, measured)


def _named(names: tuple[str, ...], *values: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(names, values, strict=True))


def _slowness(sample: Sample) -> dict[str, float]:
    """Return how many times as long as estimated each layer took that had its turn; 0 where it is not known."""
    slowness: dict[str, float] = {}
    for captured, task in zip(sample.captured, sample.tasks, strict=False):
        if task.begun and captured.shape is not None:
            is_lost = task.results is None and not task.error
            ratio = (sample.lost_seconds if is_lost else task.cost_seconds) / captured.shape.seconds
            slowness[captured.layer.name] = ratio if 0 < ratio < math.inf else 0.0
    return slowness
