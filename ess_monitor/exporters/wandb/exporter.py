"""Sends scalars to a run of Weights & Biases, which refuses rows that are older than its newest one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from ess_monitor import validation
from ess_monitor.errors import ConfigError, ExporterError, format_error
from ess_monitor.exporters.scalars import scalars
from ess_monitor.records import Measurement, RunInfo, RunStatus, Snapshot

STEP_TAG = "ess_monitor/step"
"""The steps of our charts: optimizer steps, as samples count them."""

_MOST_WAITING = 200
"""Measurements that wait for a row of the loop; the oldest then gets a row of its own."""


class WandbExporter:
    """Logs the scalars of each measurement to a W&B run, on the training thread.

    A sample is measured some steps after it was taken, and W&B ignores what comes with a lower step than its newest
    row. So nothing is logged with `step=`: every tag gets `ess_monitor/step` as its step metric.

    A new row would move the run's step, and what the loop then logs with a lower `step=` (an epoch, its own count)
    would be ignored. So a measurement joins the loop's present row. Where that row has one already, because the loop
    logs more rarely than samples are taken, the row is ended as long as the run's step stays behind the loop's next one
    by what has been seen of it; otherwise the measurement waits, at the latest until the end of the run.

    Args:
        run: what `wandb.init` returned.
        own_rows: give each measurement a row of its own, at once. For loops that log without `step=`, as Lightning and
            the Trainer do.

    Raises:
        ConfigError: `run` is no run of W&B.

    Examples:
        >>> class Run:
        ...     step = 0
        ...     def define_metric(self, name, **options): ...
        ...     def log(self, row, commit=None):
        ...         print(row["ess_monitor/step"], commit)
        >>> sink = WandbExporter(Run())
        >>> sink.export(Measurement(step=7, timestamp_seconds=0.0, readings=(), conditions={}))
        7 False
    """

    name = "wandb"
    inline = True

    def __init__(self, run: Any, *, own_rows: bool = False) -> None:
        if isinstance(run, type) or not (hasattr(run, "log") and hasattr(run, "define_metric")):
            raise ConfigError(f"run: {validation.type_of(run)} is not a run of W&B; pass what wandb.init() returned")
        self._run = run
        self._own_rows = validation.flag("own_rows", own_rows)
        self._defined = {STEP_TAG}
        self._waiting: deque[dict[str, float]] = deque()
        self._row: int | None = None
        """The run's row after our last call."""
        self._is_taken = False
        """Whether that row has a measurement."""
        self._row_of_loop = 0
        """The row that the loop itself has come to."""
        self._stride = 0
        """By how much the loop raises the run's step at once, at least; 0 before it has been seen to."""
        self._measured = 0
        """Step of the last measurement."""

    @property
    def shown_by(self) -> str | None:
        """The page of the run; None offline."""
        url = getattr(self._run, "url", None)
        return f"W&B: {url}" if url else None

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """Tell W&B of the step metric; the loop has opened the run.

        Raises:
            ExporterError: W&B does not take it, as of a run that is finished.
        """
        try:
            self._run.define_metric(STEP_TAG, hidden=True)
        except Exception as error:
            raise ExporterError(
                f"the wandb run takes no metrics ({format_error(error)}). Give one that is not finished yet."
            ) from error

    def export(self, measurement: Measurement) -> None:
        """Log the scalars of one measurement, or keep them until the loop has begun another row."""
        row = scalars(measurement)
        for tag in row.keys() - self._defined:  # by its name: of several patterns that fit W&B takes any
            self._run.define_metric(tag, step_metric=STEP_TAG)
            self._defined.add(tag)
        row[STEP_TAG] = measurement.step
        step = None if self._own_rows else self._step()
        if step is None:
            self._run.log(row)
            return
        self._waiting.append(row)
        self._follow(step, measurement.step)
        while self._waiting and (not self._is_taken or self._may_end_row()):
            self._log_next()

    def close(self, status: RunStatus) -> None:
        """Log what still waits, each in a row of its own; the loop ends the W&B run."""
        while self._waiting:
            self._log_next()

    def _step(self) -> int | None:
        """Return the row that W&B is at; None where it does not say, as in runs shared by several processes."""
        try:
            step = self._run.step
        except Exception:
            return None
        return step if isinstance(step, int) else None

    def _follow(self, step: int, measured: int) -> None:
        """Note how far the loop has come since the last measurement; it logs at most once a training step."""
        if self._row is None:
            self._row_of_loop = step
        elif step != self._row:
            stride = max(1, (step - self._row_of_loop) // max(1, measured - self._measured))
            self._stride = min(self._stride or stride, stride)
            self._row_of_loop, self._is_taken = step, False
        self._row, self._measured = step, measured

    def _may_end_row(self) -> bool:
        assert self._row is not None
        return self._row < self._row_of_loop + self._stride or len(self._waiting) > _MOST_WAITING

    def _log_next(self) -> None:
        if self._is_taken:
            self._run.log({}, commit=True)
            self._row = (self._row or 0) + 1
        self._run.log(self._waiting.popleft(), commit=False)
        self._is_taken = True
