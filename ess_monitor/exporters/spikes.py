"""Events as spikes of height 1: a vertical line in a chart of ratios, which TensorBoard itself cannot draw."""

from __future__ import annotations

from ess_monitor.exporters.scalars import layer_tag


def spike_tag(layer: str) -> str:
    """The tag of the spikes of one layer."""
    return f"ess_intervention_steps/{layer_tag(layer)}"


class Spikes:
    """The points of one series that is 1 at the steps of events and 0 right beside them.

    Example:
        >>> spikes = Spikes()
        >>> spikes.at(100)
        [(99, 0.0), (100, 1.0), (101, 0.0)]
        >>> spikes.at(102)
        [(102, 1.0), (103, 0.0)]
    """

    def __init__(self) -> None:
        self._last_step = -1

    def at(self, step: int) -> list[tuple[int, float]]:
        """(step, height) of the points to append for an event at `step`."""
        # TensorBoard takes a step that goes back for a restarted run and drops what came after it.
        foot = [(step - 1, 0.0)] if step - 1 > self._last_step else []
        self._last_step = step + 1
        return [*foot, (step, 1.0), (step + 1, 0.0)]
