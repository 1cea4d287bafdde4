"""Utilization as the rules see it: against what the geometry of H_i lets a state reach."""

from __future__ import annotations

from ess_monitor.records import Reading


def attainable_utilization(reading: Reading) -> float | None:
    """`effective_size / attainable_size`, 0..1; None where the reading cannot be judged."""
    attainable = reading.attainable_size if reading.attainable_size is not None else reading.state_capacity
    if reading.status != "ok" or reading.capacity_grows or reading.effective_size is None or not attainable:
        return None
    return reading.effective_size / attainable


def full_state_utilization(reading: Reading) -> float | None:
    """ESS / TSS over the positions at which the state could be full, i >= TSS and length - i >= TSS; None without any.

    Elsewhere the geometry of H_i = T[i:, :i] caps the rank, and a rank at its cap says nothing of the state. Ranks that
    decide together have exchanged means over all positions alone: then every position must be of this kind.
    """
    capacity = reading.state_capacity
    if not capacity or reading.effective_size is None:
        return None
    is_own = reading.utilization_min_ratio is None
    if is_own and len(reading.per_position) == len(reading.positions) > 0:
        sizes = [
            size
            for position, size in zip(reading.positions, reading.per_position, strict=True)
            if min(position, reading.length - position) >= capacity
        ]
        return sum(sizes) / len(sizes) / capacity if sizes else None
    capped = reading.attainable_size is not None and reading.attainable_size < capacity * (1 - 1e-6)
    return None if capped else reading.effective_size / capacity
