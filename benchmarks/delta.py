"""Times the gated delta rule against a diagonal recurrence of the same size: 8 heads, square-root Gramians.

Runs of the two alternate, and medians are compared. At length 512 the tolerance-ESS is checked against a full SVD of
the blocks of a materialized T, in float64, at a few of the positions.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from torch.nn.functional import normalize

from benchmarks.report import Result, main
from ess_monitor.ess import DeltaRecurrence, DiagonalRecurrence, Operator, operator_positions, tolerance_ess

HEADS, REPEATS = 8, 7
CHECKED, CHECKED_LENGTH = 5, 512
TARGET = 10.0
CASES = ((512, 16, 511), (2048, 16, 63), (512, 64, 4), (2048, 128, 8))
"""Length, state size, number of positions."""


def operators(length: int, state: int) -> tuple[DeltaRecurrence, DiagonalRecurrence]:
    """Build both operators: keys of norm 1, beta between 0 and 1, the same decays between 0.9 and 1."""
    generator = torch.Generator().manual_seed(length + state)
    shape = (1, HEADS, length, state)
    log_decay = -0.1 * torch.rand(shape, generator=generator)
    beta = torch.rand(shape[:3], generator=generator)
    k, q = normalize(torch.randn(shape, generator=generator), dim=-1), torch.randn(shape, generator=generator)
    return DeltaRecurrence(log_decay, beta, k, q), DiagonalRecurrence(log_decay, beta[..., None] * k, q)


def seconds(operator: Operator, positions: tuple[int, ...]) -> float:
    """Time one measurement."""
    started = time.perf_counter()
    tolerance_ess(operator.singular_values(positions))
    return time.perf_counter() - started


def differences(operator: DeltaRecurrence, positions: tuple[int, ...]) -> int:
    """Count the heads and positions at which the tolerance-ESS differs from that of T."""
    checked = positions[:: max(1, len(positions) // CHECKED)]
    T = operator.map(lambda tensor: tensor.double()).materialize()
    expected = torch.stack([(torch.linalg.svdvals(T[..., i:, :i]) > 1e-3).sum(-1) for i in checked], -1)
    return int((tolerance_ess(operator.singular_values(checked)) != expected).sum())


def run() -> Result:
    """Time every case on one thread, the default of the monitor's worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _compared()
    finally:
        torch.set_num_threads(threads)


def _compared() -> Result:
    rows, failures = [], []
    for length, state, number in CASES:
        delta, diagonal = operators(length, state)
        positions = operator_positions(length, number)
        different = differences(delta, positions) if length <= CHECKED_LENGTH else None
        timed = [(seconds(delta, positions), seconds(diagonal, positions)) for _ in range(REPEATS + 1)][1:]
        ours, baseline = (statistics.median(times) for times in zip(*timed, strict=True))
        rows.append(
            {
                "length": length,
                "state": state,
                "positions": number,
                "delta s": ours,
                "diagonal s": baseline,
                "ratio": ours / baseline,
                "ESS that differ": "" if different is None else different,
            }
        )
        if ours > TARGET * baseline:
            failures.append(f"length {length}, state {state}: {ours / baseline:.1f} times slower, target {TARGET:.0f}")
        if different:
            failures.append(f"length {length}, state {state}: tolerance-ESS differs at {different} places")
    return Result(
        f"Delta rule against a diagonal recurrence, {HEADS} heads, float32, one thread",
        rows,
        [f"medians of {REPEATS} alternating runs after one warm-up run"],
        failures,
    )


if __name__ == "__main__":
    sys.exit(main([run], __doc__))
