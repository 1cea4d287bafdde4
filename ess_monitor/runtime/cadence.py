"""Decides which steps are sampled: every n steps, or fewer where the measured cost would exceed the budget."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

from ess_monitor import validation

_SMOOTHING = 0.5
"""Weight of the newest sample's cost in the running mean of costs."""


class Cadence:
    """Decides the next step to sample.

    The interval is max(every_n_steps, cost / (budget * step time)): a sample that costs as much as ten training steps
    is taken every 1000 steps under a budget of 1 %. Without a budget the interval is `every_n_steps`. Step time is the
    median of the last intervals between steps, so that a validation epoch in between does not count as training.

    Args:
        every_n_steps: the shortest interval.
        budget_ratio: share of the training time that the monitor may take; None for no limit.
        locked: change the interval in `resume` only, never because of a cost that this process alone knows.
        window: number of latest steps in the median.

    Examples:
        >>> cadence = Cadence(every_n_steps=10, budget_ratio=0.01)
        >>> for step in range(1, 4):
        ...     cadence.stepped(0.1)
        >>> cadence.sampled(step=3)
        >>> cadence.spent(0.5)
        >>> cadence.interval_steps
        500
        >>> cadence.due(502), cadence.due(503)
        (False, True)
    """

    def __init__(
        self, every_n_steps: int, budget_ratio: float | None, *, locked: bool = False, window: int = 64
    ) -> None:
        hint = "or None: the interval never stretches"
        self.every_n_steps = validation.whole("every_n_steps", every_n_steps, 1)
        self.budget_ratio = (
            None if budget_ratio is None else validation.real("budget_ratio", budget_ratio, above=0, hint=hint)
        )
        self.cost_seconds = 0.0
        """Total cost of the monitor so far."""
        self.train_seconds = 0.0
        """Total time between steps so far."""
        self.excess_seconds = 0.0
        """By how much the last step took longer than the median of those before it."""
        self.next_step = 0
        self.interval_steps = self.every_n_steps
        self._locked = locked
        self._steps: deque[float] = deque(maxlen=validation.whole("window", window, 1, 2**20))
        self._last_sample = -self.every_n_steps
        self._sample_cost = 0.0
        self._cost_since_sample = 0.0
        self._debt = 0.0
        """Costs that came once and are still to be made up for, in seconds."""
        self._held = False

    @property
    def overhead_ratio(self) -> float:
        """Cost so far as a share of the training time so far."""
        return self.cost_seconds / self.train_seconds if self.train_seconds > 0 else 0.0

    @property
    def wanted_steps(self) -> int:
        """The interval that the costs so far ask for; at most doubled by a cost that came once."""
        cost = self._cost_of_a_sample
        cost += min(cost, self._debt)
        stretched = 0
        if cost > 0 and self._steps and self.budget_ratio is not None:
            stretched = math.ceil(cost / self._budget_of_a_step - 1e-9)
        return max(self.every_n_steps, stretched)

    def due(self, step: int) -> bool:
        """Return whether to sample the forward pass after `step` optimizer steps."""
        return not self._held and step >= self.next_step

    def stepped(self, seconds: float) -> None:
        """Record the duration of one training step."""
        self.excess_seconds = max(0.0, seconds - median(self._steps)) if self._steps else 0.0
        self._steps.append(seconds)
        self.train_seconds += seconds

    def sampled(self, step: int) -> None:
        """Record a sample taken after `step` optimizer steps; its costs arrive later through `spent`."""
        allowed = (step - self._last_sample) * self._budget_of_a_step
        self._debt = max(0.0, self._debt - max(0.0, allowed - self._cost_of_a_sample))
        if self._cost_since_sample > 0:
            old = self._sample_cost or self._cost_since_sample
            self._sample_cost = _SMOOTHING * self._cost_since_sample + (1 - _SMOOTHING) * old
            self._cost_since_sample = 0.0
        self._last_sample = step
        self._schedule()

    def hold(self) -> None:
        """Make no sample due until `resume`: the last one is to be judged first."""
        self._held = True

    def resume(self, interval_steps: int) -> None:
        """End `hold` and schedule the next sample this many steps after the last one."""
        self._held = False
        self.interval_steps = interval_steps
        self.next_step = self._last_sample + interval_steps

    def spent(self, seconds: float, *, once: bool = False) -> None:
        """Add to the cost of the last sample, or to what the next ones have to make up for.

        Args:
            seconds: the cost.
            once: it does not come with every sample. The interval is then at most doubled until the cost is made up
                for: in proportion to the cost, the run would be unobserved for long.
        """
        self.cost_seconds += seconds
        if once:
            self._debt += seconds
        else:
            self._cost_since_sample += seconds
        self._schedule()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on sampling at the same steps."""
        return {
            "every_n_steps": self.every_n_steps,
            "budget_ratio": self.budget_ratio,
            "next_step": self.next_step,
            "last_sample": self._last_sample,
            "interval_steps": self.interval_steps,
            "cost_seconds": self.cost_seconds,
            "train_seconds": self.train_seconds,
            "sample_cost": self._sample_cost,
            "cost_since_sample": self._cost_since_sample,
            "debt": self._debt,
            "steps": list(self._steps),
            "held": self._held,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`. Under other settings the next sample comes as these want it."""
        self.next_step, self.interval_steps = state["next_step"], state["interval_steps"]
        self.cost_seconds, self.train_seconds = state["cost_seconds"], state["train_seconds"]
        self._last_sample, self._held = state["last_sample"], state["held"]
        self._sample_cost, self._cost_since_sample = state["sample_cost"], state["cost_since_sample"]
        self._debt = state.get("debt", 0.0)
        self._steps.extend(state["steps"])
        every_n_steps = state.get("every_n_steps") or self.every_n_steps  # states of 0.1 do not have them
        budget_ratio = state.get("budget_ratio", self.budget_ratio)
        if (every_n_steps, budget_ratio) == (self.every_n_steps, self.budget_ratio):
            return
        self.interval_steps = self._stretched(every_n_steps, budget_ratio) if self._locked else self.wanted_steps
        self.next_step = self._last_sample + self.interval_steps

    def _stretched(self, every_n_steps: int, budget_ratio: float | None) -> int:
        """Return the interval that these settings have led to, under the present ones.

        It follows from what all ranks know: each has costs of its own.
        """
        stretched = self.interval_steps if self.interval_steps > every_n_steps else 0
        if budget_ratio is None or self.budget_ratio is None:
            stretched = 0
        else:
            stretched = math.ceil(stretched * budget_ratio / self.budget_ratio - 1e-9)
        return max(self.every_n_steps, stretched)

    @property
    def _cost_of_a_sample(self) -> float:
        return max(self._sample_cost, self._cost_since_sample)

    @property
    def _budget_of_a_step(self) -> float:
        """Seconds of each step that the monitor may take; 0 while none has been timed, and without a budget."""
        if not self._steps or self.budget_ratio is None:
            return 0.0
        return self.budget_ratio * max(median(self._steps), 1e-9)

    def _schedule(self) -> None:
        if not self._locked:
            self.interval_steps = self.wanted_steps
        self.next_step = self._last_sample + self.interval_steps
