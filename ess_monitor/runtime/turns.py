"""Decides which layers a sample has time for, and how much of each: layers take turns where not all fit.

The plan follows from shapes, and from numbers that all ranks and a resumed run have: when each layer was measured last,
and how many times as long as estimated it took. These are coarse, so that no noise of a clock changes the plan. While a
sample is computed `TimeLimit` follows what is left of its time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

WALL_PER_CORE_SECOND = 3.0
"""A sample has so many seconds of wall time for each second of a core: where the training fills the cores, the worker
has a part of one only."""
FILLED = 0.9
"""Share of the limit that is planned. The rest is for measurements that take a little longer than expected."""
_STEPS_PER_DOUBLING = 4
"""Paces are powers of 2^(1/4)."""
_MOST_STEPS = 10 * _STEPS_PER_DOUBLING
"""An estimate is off by a factor of 1000 at most, whatever a clock says..."""
_MOST_RISE = 3 * _STEPS_PER_DOUBLING
"""...and by at most 8 times as much from one measurement of a layer to the next."""
_KEPT = 3
"""Measurements of a layer whose slowest counts."""


class Shape(Protocol):
    """Says what is measured of a layer, with an estimate of the time."""

    @property
    def kind(self) -> str:
        """What shapes have in common whose estimates are off by about the same factor."""

    @property
    def seconds(self) -> float:
        """Estimated seconds of one core."""

    def smaller(self) -> Iterator[Self]:
        """Yield smaller shapes, the largest first."""


AnyShape = TypeVar("AnyShape", bound=Shape)


class LayerTurns:
    """Chooses the layers of each sample: as many as fit into the time, those first that have waited longest.

    A layer that alone takes longer than a sample may is measured in a smaller shape. At least one layer is in every
    sample.

    Args:
        names: of the measured layers, in model order.
        limit_seconds: of one core, for a sample; None for no limit.
        positions: where layers are measured: what shapes are to be made with.

    Examples:
        >>> from ess_monitor.ess.cost import SampleShape
        >>> turns = LayerTurns(["a", "b", "c"], limit_seconds=3.0)
        >>> shape = SampleShape("DeltaRecurrence", state=128, samples=4, heads=4, length=1024, positions=3)
        >>> def sample(step):
        ...     taken = [name for name in turns.choose(["a", "b", "c"]) if turns.fit(name, shape)]
        ...     turns.observe(step, dict.fromkeys(taken, 1.0))
        ...     turns.defer({"a", "b", "c"} - set(taken))
        ...     return taken
        >>> sample(0), sample(100), sample(200)
        (['a', 'b'], ['c', 'a'], ['b', 'c'])
    """

    def __init__(
        self,
        names: Iterable[str],
        limit_seconds: float | None,
        positions: Literal["midpoint", "all"] | int = "midpoint",
    ) -> None:
        self.limit_seconds, self.positions = limit_seconds, positions
        self._order = {name: index for index, name in enumerate(names)}
        self._last_step: dict[str, int] = {}
        """Step of the sample in which each layer had its last turn."""
        self._paces: dict[str, list[int]] = {}
        """By how many steps of the pace each layer's estimate was off, in its last measurements."""
        self._missed: dict[str, int] = {}
        """Samples that had no time for a layer."""
        self._shapes: dict[str, Shape] = {}
        """What was to be measured of each layer when it was called last."""
        self._kinds: dict[str, str] = {}
        """Kind of that shape."""
        self._saved: dict[str, float] = {}
        """What the run before expected, of layers that were not called in this one yet."""
        self._taken: dict[str, float] = {}
        """Expected seconds of each layer in this sample."""
        self._under_way: dict[int, frozenset[str]] = {}
        """Step -> layers of samples that are not yet judged."""
        self._preferred: frozenset[str] = frozenset()

    def prefer(self, names: Iterable[str]) -> None:
        """Measure these layers before all others, from the next sample on: something is to be decided on them."""
        self._preferred = frozenset(names)

    def is_preferred(self, name: str) -> bool:
        """Return whether something is to be decided on a layer."""
        return name in self._preferred

    def choose(self, names: Sequence[str]) -> list[str]:
        """Return the layers of the next sample, as far as their shapes are known, whose turn it is first.

        Args:
            names: of the layers that can be measured.
        """
        self._taken = {}
        chosen: dict[str, float] = {}
        # Half of the time at most for those on which something is to be decided, so that no other waits for ever.
        preferred = [name for name in names if name in self._preferred]
        for share, some in ((0.5, preferred), (1.0, names)):
            for name in sorted(set(some) - chosen.keys(), key=self._age):
                seconds = self._planned(name)
                if not chosen or self._fits((math.fsum(chosen.values()) + seconds) / share):
                    chosen[name] = seconds
        return list(chosen)

    def fit(self, name: str, shape: AnyShape) -> AnyShape | None:
        """Return what is measured of a layer in this sample; None where there is no time for it.

        Args:
            name: of the layer.
            shape: what the settings ask for.
        """
        self._shapes[name], self._kinds[name] = shape, shape.kind
        fitted, seconds = self._fitted(name, shape)
        others = [taken for other, taken in self._taken.items() if other != name]
        if others and not self._fits(math.fsum(others) + seconds):
            self._taken.pop(name, None)
            return None
        self._taken[name] = seconds
        return fitted

    def in_turn(self, names: Iterable[str]) -> list[str]:
        """Return names in the order of their turns."""
        return sorted(names, key=lambda name: (name not in self._preferred, self._age(name)))

    def expected_seconds(self, name: str) -> float:
        """Return how long the measurement of a layer of this sample is expected to take."""
        return self._taken.get(name, 0.0)

    def turn_of(self, name: str, sample: int) -> int:
        """Return how many turns a layer has had, after so many samples."""
        return max(0, sample - self._missed.get(name, 0))

    def defer(self, names: Iterable[str]) -> None:
        """Count a sample that had no time for these layers."""
        for name in names:
            self._missed[name] = self._missed.get(name, 0) + 1

    def begin(self, step: int, names: Iterable[str]) -> None:
        """Note that a sample with these layers is under way: until it ends, others come before them."""
        self._under_way[step] = frozenset(names)

    def end(self, step: int) -> None:
        """Note that the sample of this step is not under way any more."""
        self._under_way.pop(step, None)

    def observe(self, step: int, slowness: Mapping[str, float]) -> None:
        """Take in a sample that is judged.

        Args:
            step: of the sample.
            slowness: for each layer that had its turn, how many times as long as estimated from its shape it took; 0
                where that is not known.
        """
        for name, ratio in slowness.items():
            self._last_step[name] = step
            if 0 < ratio < math.inf:
                steps = math.ceil(_STEPS_PER_DOUBLING * math.log2(ratio) - 1e-9)
                kept = self._paces.get(name, [])
                highest = min(_MOST_STEPS, max(kept) + _MOST_RISE) if kept else _MOST_STEPS
                self._paces[name] = [*kept, min(highest, max(-_MOST_STEPS, steps))][-_KEPT:]

    def planned_seconds(self) -> float:
        """Return how long one measurement of all layers whose shapes are known takes, in as many samples as needed."""
        return math.fsum(map(self._planned, self._shapes))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on with the same turns."""
        state = {"last_step": dict(self._last_step), "paces": dict(self._paces), "missed": dict(self._missed)}
        expected = {name: self._planned(name) for name in (*self._shapes, *self._saved)}
        return {**state, "kinds": dict(self._kinds), "expected": expected}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._last_step, self._missed = dict(state["last_step"]), dict(state["missed"])
        self._kinds, self._saved = dict(state["kinds"]), dict(state["expected"])
        self._paces = {name: list(steps) for name, steps in state["paces"].items() if steps}

    def _age(self, name: str) -> tuple[bool, int, int, int]:
        """Return what layers are ordered by: those come last that are in a sample under way.

        Of layers that were measured last at the same step, those that were left out more often come first.
        """
        is_under_way = any(name in sample for sample in self._under_way.values())
        order = self._order.get(name, len(self._order))
        return is_under_way, self._last_step.get(name, -1), -self._missed.get(name, 0), order

    def _fits(self, seconds: float) -> bool:
        return self.limit_seconds is None or seconds <= FILLED * self.limit_seconds

    def _fitted(self, name: str, shape: AnyShape) -> tuple[AnyShape, float]:
        """Return the largest shape for which a whole sample has time, or else the smallest, with its seconds."""
        pace = self._pace(name, shape.kind)
        fitted = shape
        for smaller in shape.smaller():
            if self._fits(pace * fitted.seconds):
                break
            fitted = smaller
        return fitted, pace * fitted.seconds

    def _planned(self, name: str) -> float:
        """Return how long a layer is expected to take in a sample; 0 where nothing is known of it."""
        shape = self._shapes.get(name)
        return self._saved.get(name, 0.0) if shape is None else self._fitted(name, shape)[1]

    def _pace(self, name: str, kind: str) -> float:
        """Return the factor of a layer's estimates: its own, or the largest of layers of its kind, or 1."""
        steps = self._paces.get(name) or [
            each for other, paces in self._paces.items() if self._kinds.get(other) == kind for each in paces
        ]
        return float(2 ** (max(steps, default=0) / _STEPS_PER_DOUBLING))


class TimeLimit:
    """Follows the time of one sample. It has some seconds of one core, and three times as many of wall time.

    The first task is always allowed, so that a layer is measured whatever the limit is.

    Args:
        limit_seconds: of one core; None for no limit.
        clock: wall time in seconds.

    Examples:
        >>> limit = TimeLimit(10.0, lambda: 0.0)
        >>> limit.allows(30.0)
        True
        >>> limit.spend(4.0, expected_seconds=2.0)
        >>> limit.allows(2.0), limit.allows(4.0)  # tasks take twice as long as expected
        (True, False)
    """

    def __init__(self, limit_seconds: float | None, clock: Callable[[], float]) -> None:
        self._limit, self._clock = limit_seconds, clock
        self._began = clock()
        self._spent = self._expected = 0.0

    def allows(self, expected_seconds: float) -> bool:
        """Return whether a task that is expected to take so long may begin."""
        if self._limit is None or self._expected == 0:
            return True
        # Earlier tasks that took longer than expected make the next one longer; none makes it shorter.
        pace = max(1.0, self._spent / self._expected)
        if self._clock() - self._began > WALL_PER_CORE_SECOND * self._limit:
            return False
        return self._spent + pace * expected_seconds <= self._limit

    def spend(self, seconds: float, *, expected_seconds: float) -> None:
        """Add a task that is done. Seconds that are negative or not finite are those of a clock that is wrong."""
        self._spent += seconds if 0 <= seconds < math.inf else expected_seconds
        self._expected += expected_seconds


def samples_for_all(shapes: Mapping[str, AnyShape], limit_seconds: float | None) -> int:
    """Return in how many samples all layers are measured once, if the estimates are right.

    Args:
        shapes: what is measured of each layer.
        limit_seconds: as in `LayerTurns`.
    """
    turns, left, samples = LayerTurns(shapes, limit_seconds), set(shapes), 0
    while left:
        taken = [name for name in turns.choose(list(shapes)) if turns.fit(name, shapes[name])]
        turns.observe(samples, dict.fromkeys(taken, 0.0))
        left -= set(taken)
        samples += 1
    return samples
