"""Measures samples on one worker thread, in order, with a bounded queue.

The training thread only puts a job on a queue and asks whether the oldest one is done. A job that finds the queue full
is dropped; one that takes too long is given up, and its late results are discarded.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from pydantic import Field

from ess_monitor import validation
from ess_monitor.errors import format_error
from ess_monitor.runtime.backends import Task
from ess_monitor.runtime.guard import logger
from ess_monitor.runtime.shutdown import SHUTDOWN_GRACE_SECONDS, TorchThread
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
    timeout_seconds: float = Field(default=120.0, gt=0)
    """A sample that is not done by then is given up with status timed_out."""


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
                if self._clock() - job.submitted < self.config.timeout_seconds:
                    break
                self._give_up(job, f"not measured within runtime.timeout_seconds = {self.config.timeout_seconds:g}")
            if self._take_out(job):
                finished.append(job)
        return finished

    def drain(self, timeout_seconds: float) -> list[AnyJob]:
        """Wait up to `timeout_seconds` for all open jobs, then `poll`."""
        self._wait_for(self._open, timeout_seconds)
        return self.poll()

    def take(self, timeout_seconds: float) -> AnyJob | None:
        """Wait up to `timeout_seconds` for the oldest job, then give it up. Return it; None when there is none."""
        job = self._oldest()
        if job is None:
            return None
        self._wait_for([job], timeout_seconds)
        if not job.finished:
            self._give_up(job, f"not measured within {timeout_seconds:g} seconds of its judgment")
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

    def _wait_for(self, jobs: Collection[AnyJob], timeout_seconds: float) -> None:
        deadline, jobs = self._clock() + timeout_seconds, tuple(jobs)
        with self._wake:
            while self._clock() < deadline and not all(job.finished for job in jobs):
                self._hand_over()
                self._wake.wait(timeout=_POLL_SECONDS)

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
        for task in job.tasks:
            if job.state == "abandoned" or self._closing:
                break
            if task.error or task.results is not None:  # handed over twice, by a signal handler
                continue
            try:
                task.backend.launch(task)
            except BaseException as error:  # sys.exit() in a task must not end the worker with an unfinished job
                _fail(task, error)


def _fail(task: Task, error: BaseException) -> None:
    logger.debug("ess_monitor: failure in the worker", exc_info=error)
    task.error, task.cause = format_error(error), error.with_traceback(None)
    task.inputs = ()
