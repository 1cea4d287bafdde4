"""Times softmax attention at 8 positions: one H_i at a time against an SVD of the same blocks of T."""

from __future__ import annotations

import sys
import time

import torch

from benchmarks.report import Result, main
from ess_monitor.ess import SoftmaxAttention, operator_positions, tolerance_ess

LENGTH, DIM, POSITIONS = 2048, 64, 8


def run() -> Result:
    """Time both methods on one head."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn((1, 1, LENGTH, DIM), generator=generator) for _ in range(2))
    operator = SoftmaxAttention(q, k)
    positions = operator_positions(LENGTH, POSITIONS)
    started = time.perf_counter()
    ess = tolerance_ess(operator.singular_values(positions))
    ours = time.perf_counter() - started
    T = operator.materialize()
    started = time.perf_counter()
    expected = torch.stack([(torch.svd(T[..., i:, :i])[1] > 1e-3).sum(-1) for i in positions], -1)
    baseline = time.perf_counter() - started
    rows = [
        {
            "length": LENGTH,
            "positions": POSITIONS,
            "ours s": ours,
            "full SVD s": baseline,
            "ratio": baseline / ours,
            "mean ESS": float(ess.mean()),
            "largest difference": float((ess - expected).abs().max()),
        }
    ]
    return Result(
        f"Softmax attention, one head, dim {DIM}, float32",
        rows,
        ["a dense spectrum passes tau = 1e-3 everywhere: differences are the rounding of float32 near it"],
    )


if __name__ == "__main__":
    sys.exit(main([run], __doc__))
