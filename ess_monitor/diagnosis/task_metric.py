"""The task metric over a run: its last known value at each measurement, and which of its values are new.

Many loops compute a metric once an epoch and give its last known value at every step in between. Such a repeated value
says nothing of whether the task stands still. A value that equals the one before it bit for bit is therefore taken for
a repeated one: a metric that is computed anew hardly ever gives all its bits again.

The exception is a metric with few possible values, such as an accuracy that stays at exactly 0. It counts as standing
still once it has been repeated for `metric_constant_after` measurements, and for as long as `metric_new_values` new
values would have taken at the longest distance between those seen so far.

A metric that has not been given at all for that long is not known any more.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ess_monitor.diagnosis.config import DiagnosisConfig

_Count = Annotated[int, Field(ge=0, le=2**63 - 1)]


class TaskMetricState(BaseModel):
    """Validates `TaskMetric.state`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    new: list[tuple[_Count, float]]
    age: _Count
    repeats: _Count
    silence: _Count


class TaskMetric:
    """Follows one metric of the training loop. Memory is bounded: two windows of numbers.

    Args:
        config: `metric`, `metric_new_values`, `metric_constant_after` and the windows are used.

    Examples:
        >>> metric = TaskMetric(DiagnosisConfig(metric="accuracy", metric_solved=0.9))
        >>> for value in (0.1, 0.1, 0.1, 0.3, 0.3):
        ...     metric.observe({"accuracy": value})
        >>> metric.known, metric.new_over(10)
        ((0.1, 0.1, 0.1, 0.3, 0.3), (0.1, 0.3))
    """

    def __init__(self, config: DiagnosisConfig) -> None:
        self._config = config
        window = max(config.trend_window, config.plateau_window)
        self._known: deque[float] = deque(maxlen=window)
        self._new: deque[tuple[int, float]] = deque(maxlen=max(window, config.metric_new_values))
        """New values, each behind the number of measurements since the one before it, or since the start."""
        self._age = 0
        """Measurements since the newest new value; since the start where there is none."""
        self._repeats = 0
        """Those of them in which it was given again."""
        self._silence = 0
        """Measurements since any value was given."""

    @property
    def known(self) -> tuple[float, ...]:
        """Last known value at each measurement of the longer of trend and plateau window, oldest first."""
        return tuple(self._known)

    @property
    def is_silent(self) -> bool:
        """Whether the metric has not been given for so long that its last value is no longer known to hold."""
        return bool(self._new) and self._silence >= self._longest_wait

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Take in one measurement. A value that is absent or not finite leaves the last known one valid."""
        value = metrics.get(self._config.metric) if self._config.metric is not None else None
        self._append(float(value) if value is not None and math.isfinite(value) else None)

    def new_over(self, window: int) -> tuple[float, ...]:
        """Return the new values of the last `window` measurements, and older ones up to `metric_new_values` of them.

        Fewer are all that there are: a trend is not known then. Of a metric that stands still, because it has been
        repeated for so long, its value is returned `metric_new_values` times.
        """
        enough, age = self._config.metric_new_values, self._age
        if self._is_constant:
            return (self._new[-1][1],) * enough
        values: list[float] = []
        for gap, value in reversed(self._new):
            if age >= window and len(values) >= enough:
                break
            values.append(value)
            age += gap
        return tuple(reversed(values))

    def state(self) -> TaskMetricState:
        """Return what `load` needs besides the known values."""
        return TaskMetricState(new=list(self._new), age=self._age, repeats=self._repeats, silence=self._silence)

    @classmethod
    def load(cls, config: DiagnosisConfig, known: Sequence[float], state: TaskMetricState | None) -> TaskMetric:
        """Return the metric as it was saved. Under smaller windows the newest values are kept.

        Args:
            config: of the run that goes on.
            known: the known values.
            state: None in a state of 0.1, which has the known values alone; they are then taken in one by one.
        """
        metric = cls(config)
        if state is None:
            for value in known:
                metric._append(value)
            return metric
        metric._known.extend(known)
        metric._new.extend(state.new)
        metric._age, metric._repeats, metric._silence = state.age, state.repeats, state.silence
        return metric

    def _append(self, value: float | None) -> None:
        self._age += 1
        self._silence = self._silence + 1 if value is None else 0
        if value is not None and (not self._new or value != self._new[-1][1]):
            self._new.append((self._age, value))
            self._age = self._repeats = 0
        elif value is not None:
            self._repeats += 1
        if self._new:
            self._known.append(self._new[-1][1])

    @property
    def _longest_wait(self) -> int:
        """Measurements without a new value from which the last one tells something."""
        longest = max((gap for gap, _ in self._new), default=0)
        return max(self._config.metric_constant_after, self._config.metric_new_values * longest)

    @property
    def _is_constant(self) -> bool:
        # A value that was given once and is silent since has not been seen to stand still.
        enough = self._repeats >= self._config.metric_new_values
        return bool(self._new) and enough and self._age >= self._longest_wait
