"""Measures samples on one worker thread, in order, with a bounded queue.

The training thread only puts a job on a queue and asks whether the oldest one is done. A job that finds the queue full
is dropped. A job whose time is over begins no further task. One in which a task takes too long is given up, and what
that task gives later is discarded.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import Field

from ess_monitor import validation
from ess_monitor.errors import format_error
from ess_monitor.runtime.backends import Task
from ess_monitor.runtime.guard import logger
from ess_monitor.runtime.shutdown import SHUTDOWN_GRACE_SECONDS, TorchThread
from ess_monitor.runtime.turns import TimeLimit
from ess_monitor.validation.settings import Settings

_LAST_TASK_SECONDS = 30.0
"""Seconds for which the end of the process waits for the task that the worker computes."""
_POLL_SECONDS = 0.005
"""Seconds between two looks at a job that is waited for: copies from a device arrive without a notification."""


class RuntimeConfig(Settings):
    """Sets where and for how long the measurements run."""

    queue_length: int = Field(default=2, ge=1)
    """Samples that may wait or be under way. 2 lets one finish while the next is taken; more only delay results."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of the worker. 1 leaves the cores to the training."""
    sample_seconds: Annotated[float, Field(gt=0)] | None = 10.0
    """Seconds of one core that a sample may take; three times as many of wall time. Where not all layers fit, they take
    turns over the samples; one that alone does not fit is measured on fewer sequences and heads, then on fewer tokens.
    10 s under a budget of 1 % is a sample in 17 minutes. None: no limit, so that what is measured does not depend on
    the machine."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """A layer that takes longer is given up with status timed_out."""


@dataclass(eq=False, kw_only=True)
class Job:
    """Groups the tasks of one sample. Sub-classes say which sample it is."""

    tasks: list[Task] = field(default_factory=list)
    submitted: float = 0.0
    state: Literal["submitted", "abandoned"] = "submitted"
    handed_over: bool = False
    """True once the worker was given it, which it is when its inputs are on the host."""
    finished: bool = False
    """True once the worker is through with it."""
    error: str = ""
    lost_seconds: float = 0.0
    """Time that went into the task with which it was given up."""

    def begin(self) -> None:
        """Start to bring the inputs of the tasks to the host. Where that fails, the tasks say why."""
        for backend in dict.fromkeys(task.backend for task in self.tasks):
            tasks = [task for task in self.tasks if task.backend is backend]
            try:
                backend.begin(tasks)
            except Exception as error:
                for task in tasks:
                    _fail(task, error)


AnyJob = TypeVar("AnyJob", bound=Job)


class Executor(Generic[AnyJob]):
    """Runs jobs on one daemon worker thread. The thread starts with the first job and ends with `close`."""

    def __init__(self, config: RuntimeConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = validation.instance("config", config, RuntimeConfig)
        self.dropped = 0
        self._clock = validation.function("clock", clock)
        self._open: deque[AnyJob] = deque()
        """Submitted and not yet returned, oldest first."""
        self._todo: deque[AnyJob] = deque()
        """Not yet begun by the worker."""
        self._running: AnyJob | None = None
        self._progressed = -math.inf
        """When the worker began or ended a task last."""
        self._wake = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._open)

    @property
    def stuck(self) -> bool:
        """True while the worker is still busy with a job that was given up."""
        running = self._running
        return running is not None and running.state == "abandoned"

    def submit(self, job: AnyJob) -> bool:
        """Queue a job. Drop and count it, and return False, where the queue is full or closed or the worker stuck."""
        if self._closing or self.stuck or len(self._open) >= self.config.queue_length:
            self.dropped += 1
            return False
        job.submitted = self._clock()
        job.begin()
        self._open.append(job)
        self._hand_over()
        if self._thread is None or not self._thread.is_alive():
            self._thread = TorchThread(self._work, "ess-monitor-worker", self._request_stop)
            self._thread.start()
        return True

    def poll(self) -> list[AnyJob]:
        """Return jobs that are done or given up, oldest first, without waiting. A later job never passes an earlier."""
        finished: list[AnyJob] = []
        self._hand_over()
        while (job := self._oldest()) is not None:
            if not job.finished:
                if self._waited(job) < self.config.timeout_seconds:
                    break
                self._give_up(job, f"not measured within runtime.timeout_seconds = {self.config.timeout_seconds:g}")
            if self._take_out(job):
                finished.append(job)
        return finished

    def drain(self, timeout_seconds: float) -> list[AnyJob]:
        """Wait up to `timeout_seconds` for all open jobs, then `poll`."""
        self._wait_for(self._open, timeout_seconds)
        return self.poll()

    def take(self, timeout_seconds: float | None = None) -> AnyJob | None:
        """Wait for the oldest job, then give it up. Return it; None when there is none.

        Args:
            timeout_seconds: of the wait; by default `runtime.timeout_seconds` for each task.
        """
        job = self._oldest()
        if job is None:
            return None
        within = self.config.timeout_seconds if timeout_seconds is None else timeout_seconds
        self._wait_for([job], within, each_task=timeout_seconds is None)
        if not job.finished:
            self._give_up(job, f"not measured within {within:g} seconds of its judgment")
        return job if self._take_out(job) else None

    def close(self, timeout_seconds: float = 2.0) -> None:
        """End the worker after its present task. Where that takes longer, leave it behind in its daemon thread."""
        self._request_stop()
        if self._thread is not None:
            self._thread.join(timeout_seconds)

    def _oldest(self) -> AnyJob | None:
        try:
            return self._open[0]
        except IndexError:
            return None

    def _take_out(self, job: AnyJob) -> bool:
        """Take a job out of the open ones; False where a signal handler that came in between has done so."""
        try:
            self._open.remove(job)
        except ValueError:
            return False
        return True

    def _wait_for(self, jobs: Collection[AnyJob], timeout_seconds: float, *, each_task: bool = False) -> None:
        """Wait until the jobs are done, for so long; with `each_task` so long after the last task that began."""
        since, jobs = self._clock(), tuple(jobs)
        with self._wake:
            while not all(job.finished for job in jobs):
                if self._clock() - (max(since, self._progressed) if each_task else since) >= timeout_seconds:
                    break
                self._hand_over()
                self._wake.wait(timeout=_POLL_SECONDS)

    def _waited(self, job: Job) -> float:
        """Return how long nothing has happened that brings a job nearer to its end."""
        waited: float = self._clock() - max(job.submitted, self._progressed)
        return waited

    def _hand_over(self) -> None:
        """Give the worker the jobs whose inputs have arrived, in order. Called on the training thread alone."""
        with self._wake:
            for job in tuple(self._open):
                if job.handed_over:
                    continue
                if not all(task.error or task.arrived() for task in job.tasks):
                    break
                # In this order: a signal handler that drains in between waits for no job that is not begun.
                self._todo.append(job)
                job.handed_over = True
            self._wake.notify_all()

    def _give_up(self, job: AnyJob, why: str) -> None:
        if any(task.begun for task in job.tasks):
            job.lost_seconds = max(0.0, self._waited(job))
        job.state, job.error = "abandoned", why
        with self._wake:
            if job in self._todo:  # behind a job that hangs: releases the captured tensors
                self._todo.remove(job)

    def _request_stop(self) -> float:
        grace_seconds = SHUTDOWN_GRACE_SECONDS if self.stuck else _LAST_TASK_SECONDS
        with self._wake:
            self._closing = True
            self._todo.clear()
            self._wake.notify_all()
        return grace_seconds

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._todo and not self._closing:
                    self._wake.wait()
                if self._closing:
                    return
                job = self._running = self._todo.popleft()
            self._launch(job)
            with self._wake:
                job.finished = True
                self._running = None
                self._wake.notify_all()
            del job  # or its captured tensors would be kept until the next sample

    def _launch(self, job: AnyJob) -> None:
        limit = TimeLimit(self.config.sample_seconds, self._clock)
        for task in job.tasks:
            if job.state == "abandoned" or self._closing:
                break
            if task.error or task.results is not None:  # handed over twice, by a signal handler
                continue
            if task.expected_seconds and not limit.allows(task.expected_seconds):
                continue
            began = self._progressed = self._clock()
            task.begun = True
            try:
                task.backend.launch(task)
            except BaseException as error:  # sys.exit() in a task must not end the worker with an unfinished job
                _fail(task, error)
            self._progressed = self._clock()
            if task.expected_seconds:
                spent = task.cost_seconds if task.results is not None else self._progressed - began
                limit.spend(spent, expected_seconds=task.expected_seconds)


def _fail(task: Task, error: BaseException) -> None:
    logger.debug("ess_monitor: failure in the worker", exc_info=error)
    task.error, task.cause = format_error(error), error.with_traceback(None)
    task.inputs = ()
