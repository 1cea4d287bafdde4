"""Notices layers whose state modulation is asked for and not known."""

from __future__ import annotations

from collections.abc import Sequence

from ess_monitor.records import Reading, layer_title

SAMPLES = 20
"""Samples without a separator after which it is said: 80 sequences at the default settings."""


class AbsentModulation:
    """Warns once for each reason, and once where no sequence of many samples has held a separator.

    Args:
        separators: the token ids; without any nothing is observed.

    Examples:
        >>> absent = AbsentModulation([0])
        >>> reading = Reading(step=1, layer="mixer", status="ok", modulation_message="no token ids")
        >>> absent.observe([reading]), absent.observe([reading])
        (['modulation: mixer has no modulation_ratio: no token ids'], [])
    """

    def __init__(self, separators: Sequence[int]) -> None:
        self._separators = tuple(separators)
        self._said: set[tuple[str, str]] = set()
        self._is_settled = not self._separators
        self._samples = 0

    def observe(self, readings: Sequence[Reading]) -> list[str]:
        """Return the warnings about the readings of one sample."""
        measured = [each for each in readings if each.status == "ok"] if self._separators else []
        by_reason: dict[str, list[str]] = {}
        for reading in measured:
            key = (reading.layer, reading.modulation_message)
            if reading.modulation_message and key not in self._said:
                self._said.add(key)
                by_reason.setdefault(reading.modulation_message, []).append(layer_title(reading.layer))
        said = [
            f"modulation: {', '.join(layers[:8])}{' and others have' if len(layers) > 8 else ' has'} no "
            f"modulation_ratio: {reason}"
            for reason, layers in by_reason.items()
        ]
        looked_at = [reading for reading in measured if not reading.modulation_message]
        self._is_settled = self._is_settled or any(each.modulation_separators for each in looked_at)
        if self._is_settled or not looked_at:
            return said
        self._samples += 1
        if self._samples < SAMPLES:
            return said
        self._is_settled = True
        ids = ", ".join(map(str, self._separators[:8]))
        return [
            *said,
            f"modulation: no sequence of {SAMPLES} samples held a separator ({ids}) in its middle three quarters, with "
            "three other tokens before it; set modulation.separators to ids that the data have, or raise "
            "capture.samples",
        ]
