"""Takes the samples of a run: arms the trigger, and hands what it captured to the queue."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from ess_monitor import validation
from ess_monitor.capture.hooks.compiler import has_compiled
from ess_monitor.config import MonitorConfig
from ess_monitor.pipeline.context import Metrics, check_metrics
from ess_monitor.pipeline.queue import MeasurementQueue
from ess_monitor.pipeline.schedule import Schedule
from ess_monitor.pipeline.view import RunView
from ess_monitor.records import RunStatus

Self = TypeVar("Self", bound="RunSampling")


class RunSampling(RunView):
    """Samples forward passes. The base of `Monitor`, which sets these fields."""

    config: MonitorConfig
    _queue: MeasurementQueue
    _schedule: Schedule

    def __enter__(self: Self) -> Self:
        self.start()
        self._in_block = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self._in_block = False
        self.close("finished" if kind is None else "failed")

    @abstractmethod
    def start(self) -> None:
        """Begin the run."""

    @abstractmethod
    def close(self, status: RunStatus = "finished") -> None:
        """End the run."""

    def arm(self, *, any_pass: bool = False) -> None:
        """Sample the next forward pass. `step` does this by itself when training batches are the source.

        Args:
            any_pass: where training batches are the source, take the next forward pass even if no backward pass
                follows.

        Raises:
            ConfigError: the monitor was not started.
        """
        if self._takes("arm") and self._context.layers and not self._schedule.waiting:
            self._trigger.arm(
                self._step,
                measures=self._schedule.measures,
                exchanges=self._schedule.exchanges,
                any_pass=any_pass,
            )
            if not self._running:  # a signal handler has closed the monitor meanwhile
                self._trigger.stop()

    def disarm(self, metrics: Metrics | None = None) -> None:
        """Remove the hooks and send what they captured to be measured."""
        check_metrics(metrics, "disarm")
        if not self._context.health.forked:
            self._collect(metrics)

    @contextmanager
    def sample(self, metrics: Metrics | None = None) -> Iterator[None]:
        """Sample the first forward pass inside the block, whether it is due or trains or not.

        For validation batches and notebooks.

        Raises:
            ConfigError: the monitor was not started.
        """
        check_metrics(metrics, "sample")
        self.arm(any_pass=True)
        try:
            yield
        finally:
            self.disarm(metrics)

    def note(self, metrics: Metrics | None) -> None:
        """Take metrics that come between two steps, such as those of an evaluation at the end of an epoch.

        The task metric (`diagnosis.metric`) goes with the next sample. The others are looked at on sampled steps only.

        Raises:
            ConfigError: the monitor was not started.
        """
        if self._takes("note"):
            check_metrics(metrics, "note")
            self._context.metrics.keep(metrics)

    def evaluates(self, now: bool) -> None:
        """Tell the monitor that the loop begins to evaluate, or is done with it.

        In between no forward pass is taken for one that trains. Without this call an evaluation is told by its having
        no backward pass; it matters where one computes gradients that do reach parameters.

        Args:
            now: True at the beginning, False at the end.
        """
        self._trigger.pause(validation.flag("now", now))

    def _arm_if_due(self) -> None:
        if self.config.capture.source == "train" and self.sample_due:
            self.arm()

    def _collect(self, metrics: Metrics | None) -> None:
        """Hand the sample under way from the trigger to the queue, and its step to the schedule."""
        step, schedule, context = self._trigger.armed_at, self._schedule, self._context
        if step is None:
            context.metrics.keep(metrics)
            return
        # An empty sample is no success of capture: it must not end a row of failures.
        with context.guards["capture"] if self._trigger.has_hooks else nullcontext():
            started = context.clock()
            sample = self._trigger.collect(exchanges=schedule.exchanges)
            changes = self._replays.take()
            if sample is not None:
                sample.changes = changes
                schedule.taken(step)
                self._queue.submit(sample, metrics)
                in_step = sample.hook_seconds
                if has_compiled():  # the step ran eagerly
                    in_step = max(in_step, context.cadence.excess_seconds - sample.test_seconds)
                seconds = in_step + context.clock() - started
                context.charge("capture", seconds, once_seconds=sample.test_seconds)
            else:
                context.metrics.keep(metrics)
        if schedule.exchanges and not schedule.waiting:
            schedule.taken(step)
