"""Times ESS at all positions of 8 heads with state 16: square-root Gramians against a full SVD of every H_i.

The baseline is the paper's method (appendix C.1.1): materialize T, then `torch.svd` of T[i:, :i] at every position. At
length 2048 it is timed on evenly spaced positions and scaled to all of them; the tolerance-ESS is compared there.
"""

from __future__ import annotations

import sys
import time

import torch

from benchmarks.report import Result, main
from ess_monitor.ess import DiagonalRecurrence, operator_positions, tolerance_ess

HEADS, STATE = 8, 16
SAMPLED = 24
TARGETS = {512: 50.0, 2048: 1000.0}


def recurrence(length: int) -> DiagonalRecurrence:
    """Build a gated recurrence with decays between 0.9 and 1, typical of a trained gate."""
    generator = torch.Generator().manual_seed(length)
    shape = (1, HEADS, length, STATE)
    log_decay = -0.1 * torch.rand(shape, generator=generator)
    b, c = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator) / STATE**0.5
    return DiagonalRecurrence(log_decay, b, c)


def full_svd(T: torch.Tensor, positions: tuple[int, ...]) -> tuple[float, torch.Tensor]:
    """Return the seconds and the tolerance-ESS at each position, by one full SVD per position."""
    started, counts = time.perf_counter(), []
    for i in positions:
        _, sigma, _ = torch.svd(T[..., i:, :i])
        counts.append((sigma > 1e-3).sum(-1))
    return time.perf_counter() - started, torch.stack(counts, -1)


def run() -> Result:
    """Time both methods at both lengths."""
    rows, failures = [], []
    for length, target in TARGETS.items():
        operator = recurrence(length)
        everywhere = operator_positions(length, "all")
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            ess = tolerance_ess(operator.singular_values(everywhere))
            seconds.append(time.perf_counter() - started)
        ours = sorted(seconds)[1]
        sampled = everywhere if length == 512 else operator_positions(length, SAMPLED)
        baseline, expected = full_svd(operator.materialize(), sampled)
        baseline *= len(everywhere) / len(sampled)
        found = ess[..., [everywhere.index(i) for i in sampled]]
        different = int((found != expected).sum())
        ratio = baseline / ours
        rows.append(
            {
                "length": length,
                "positions": len(everywhere),
                "ours s": ours,
                "full SVD s": baseline,
                "timed on": len(sampled),
                "ratio": ratio,
                "ESS compared": found.numel(),
                "different": different,
            }
        )
        if ratio < target:
            failures.append(f"length {length}: {ratio:.0f} times faster, target {target:.0f}")
        if different:
            failures.append(f"length {length}: tolerance-ESS differs at {different} of {found.numel()} places")
    return Result(
        f"All positions, {HEADS} heads, n = {STATE}, float32",
        rows,
        [f"full SVD at length 2048: timed on {SAMPLED} evenly spaced positions and scaled to all"],
        failures,
    )


if __name__ == "__main__":
    sys.exit(main([run], __doc__))
