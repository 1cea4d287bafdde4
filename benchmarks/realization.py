"""Realizes an operator of each class: error at full rank, error of truncations, and CPU time against length.

T is built by `materialize` in float64. The targets: T is rebuilt to 1e-12 of its largest entry; where factors exist the
growth exponent of time against length is 1.3 at most.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.length_scaling import slope
from benchmarks.report import Result, main
from ess_monitor.ess import (
    Convolution,
    DeltaRecurrence,
    DenseOperator,
    DiagonalRecurrence,
    GatedConvolution,
    JacobianOperator,
    Operator,
    ReadFirstRecurrence,
    SoftmaxAttention,
    realize,
)

HEADS, LENGTH, STATE, SIZES = 4, 64, 16, (1, 2, 4, 8)
LENGTHS = (256, 512, 1024, 2048)
MAX_ERROR, MAX_EXPONENT = 1e-12, 1.3


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _vectors(length: int) -> tuple[Tensor, Tensor]:
    return _randn(1, HEADS, length, STATE), _randn(1, HEADS, length, STATE)


def _decay(length: int, state: int = STATE) -> Tensor:
    return -0.1 * torch.rand(1, HEADS, length, state, dtype=torch.float64)


def _delta(length: int) -> Operator:
    k, q = _vectors(length)
    beta = torch.rand(1, HEADS, length, dtype=torch.float64)
    return DeltaRecurrence(_decay(length, 1), beta, torch.nn.functional.normalize(k, dim=-1), q)


def _rwkv7(length: int) -> Operator:
    left, (b, c) = torch.nn.functional.normalize(_randn(1, HEADS, length, STATE), dim=-1), _vectors(length)
    return DeltaRecurrence.diagonal_plus_rank_one(_decay(length), left, -0.5 * left, b, c)


def _gru(length: int) -> Operator:
    layer = torch.nn.GRU(4, 3, batch_first=True).double()
    return JacobianOperator(_randn(1, 1, length, 4), lambda u: layer(u)[0], tolerance=0.0)


MAKERS: dict[str, Callable[[int], Operator]] = {
    "linear attention": lambda n: DiagonalRecurrence(torch.zeros(1, 1, 1, 1).double(), *_vectors(n)),
    "gated linear attention": lambda n: DiagonalRecurrence(_decay(n), *_vectors(n)),
    "scalar decay": lambda n: DiagonalRecurrence(_decay(n, 1), *_vectors(n)),
    "read first (RWKV-4, -6)": lambda n: ReadFirstRecurrence(_decay(n), *_vectors(n)),
    "gated delta rule": _delta,
    "diagonal plus rank one (RWKV-7)": _rwkv7,
    "short filter, 4 taps": lambda n: Convolution(_randn(1, HEADS, 4), n),
    "gated filter, 4 taps": lambda n: GatedConvolution(_randn(1, HEADS, n), _randn(1, HEADS, 4), _randn(1, HEADS, n)),
    "long filter": lambda n: Convolution(_randn(1, HEADS, n)),
    "softmax attention": lambda n: SoftmaxAttention(*_vectors(n)),
    "dense": lambda n: DenseOperator(_randn(1, HEADS, n, n).tril()),
    "dense, blocks of 2": lambda n: DenseOperator(
        _randn(1, HEADS, n, n).masked_fill((torch.arange(n) // 2) > (torch.arange(n) // 2)[:, None], 0.0), 2
    ),
    "Jacobian of a GRU": _gru,
}
BY_FACTORS = tuple(MAKERS)[:8]


def errors() -> Result:
    """Rebuild T at full rank, and compare the spectral error of truncations with max sigma_{r+1}."""
    rows, failures = [], []
    for name, make in MAKERS.items():
        torch.manual_seed(0)
        operator = make(16 if name.startswith("Jacobian") else LENGTH)
        T, realization = operator.materialize(), realize(operator)
        largest = T.abs().amax((2, 3))
        full = float(((realization.materialize() - T).abs().amax((2, 3)) / largest).max())
        blocks = _values(operator, T)
        row = {"operator": name, "largest state": realization.size, "error of T": full}
        for size in SIZES:
            left_out = blocks[..., size].amax(-1) if size < blocks.shape[-1] else torch.zeros(())
            ratio = torch.linalg.matrix_norm(realize(operator, size=size).materialize() - T, 2) / left_out
            row[f"r = {size}"] = float(ratio.max()) if bool((left_out > 1e-9).all()) else "-"
        rows.append(row)
        if full > MAX_ERROR:
            failures.append(f"{name}: T is rebuilt to {full:.1e}, target {MAX_ERROR}")
    note = "error of T: largest entry of the difference / largest of T. r: ||T - T_r||_2 / max over i of sigma_{r+1}"
    return Result(
        f"Realization, {HEADS} heads, n = {STATE}, L = {LENGTH} (Jacobian: 16), float64", rows, [note], failures
    )


def _values(operator: Operator, T: Tensor) -> Tensor:
    rows, columns = (size // operator.length for size in T.shape[2:])
    each = [torch.linalg.svdvals(T[:, :, rows * i :, : columns * i]) for i in range(1, operator.length)]
    rank = max(values.shape[-1] for values in each)
    return torch.stack([torch.nn.functional.pad(values, (0, rank - values.shape[-1])) for values in each], dim=2)


def time_against_length() -> Result:
    """Time a realization at every length: by the factors, and for attention, which has none, at short ones."""
    rows, failures = [], []
    for name in (*BY_FACTORS, "softmax attention"):
        lengths = LENGTHS if name in BY_FACTORS else tuple(n // 8 for n in LENGTHS)
        torch.manual_seed(0)
        seconds = [_seconds(MAKERS[name](length)) for length in lengths]
        exponent = slope([math.log(n) for n in lengths], [math.log(s) for s in seconds])
        steps = [math.log2(later / earlier) for earlier, later in pairwise(seconds)]
        timed = {f"{n}": f"{s:.3g} s" for n, s in zip(LENGTHS, seconds, strict=True)}
        shown = "" if name in BY_FACTORS else f" (L = {', '.join(map(str, lengths))})"
        rows.append({"operator": name + shown, **timed, "exponent": exponent, "last doubling": steps[-1]})
        if name in BY_FACTORS and exponent > MAX_EXPONENT:
            failures.append(f"{name}: growth exponent {exponent:.2f}, target at most {MAX_EXPONENT}")
    return Result(f"CPU time against length, full rank, {HEADS} heads, n = {STATE}, float64", rows, [], failures)


def _seconds(operator: Operator) -> float:
    measured = []
    for _ in range(3):
        started = time.process_time()
        realize(operator)
        measured.append(time.process_time() - started)
    return min(measured)


if __name__ == "__main__":
    sys.exit(main([errors, time_against_length], __doc__))
