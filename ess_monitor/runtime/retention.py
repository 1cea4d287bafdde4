"""Remembers what the effective size of each layer was without decay, and says when to measure it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class UndecayedSizes:
    """Holds the last effective size of each layer with A := I, which every n-th of its samples measures.

    Args:
        every_n_samples: n.

    Examples:
        >>> sizes = UndecayedSizes(every_n_samples=3)
        >>> for step in (0, 100, 200, 300):
        ...     if sizes.begin("mixer"):
        ...         sizes.end("mixer", step, 8.0)
        ...     print(step, sizes.last("mixer"))
        0 (0, 8.0)
        100 (0, 8.0)
        200 (0, 8.0)
        300 (300, 8.0)
    """

    def __init__(self, every_n_samples: int) -> None:
        self._every = every_n_samples
        self._last: dict[str, tuple[int, float]] = {}
        self._ages: dict[str, int] = {}
        """Samples of each layer since the one that measured it; absent where the next one has to measure it."""

    def begin(self, name: str, *, always: bool = False) -> bool:
        """Count a sample of a layer, and return whether it measures the size without decay.

        Args:
            name: of the layer.
            always: whether it does in any case.
        """
        age = 1 + self._ages.get(name, self._every)
        measures = always or age >= self._every
        self._ages[name] = 0 if measures else age
        return measures

    def end(self, name: str, step: int, size: float | None) -> None:
        """Take in what a sample that measures it found; None where it was lost, or the layer has no decay."""
        if size is None:
            self._ages.pop(name, None)
        else:
            self._last[name] = step, size

    def last(self, name: str) -> tuple[int, float] | None:
        """Return the step of the sample that measured a layer last, and the size; None where none did."""
        return self._last.get(name)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on."""
        return {"last": {name: list(each) for name, each in self._last.items()}, "ages": dict(self._ages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._last = {name: (int(step), float(size)) for name, (step, size) in state["last"].items()}
        self._ages = dict(state["ages"])
