"""Guards the factorizations of the metric against NaN, Inf and failed convergence.

Everything is computed in float64, also for float32 and half inputs: batched LAPACK on matrices of this size is not
slower in float64, sums of thousands of log decays stay exact, and the singular values far below the largest, which
entropy-ESS sums up, do not drown in rounding. Results are handed out in float32 unless the inputs were float64.

Nothing here reads a tensor's value on the host. A matrix that holds NaN or Inf never reaches LAPACK; it gives NaN.
(torch's own SVD checks its status on the host on CUDA. The monitor computes on the CPU alone.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
"""What torch raises when a factorization does not converge."""

SLAB_ELEMENTS = 1 << 20
"""Elements of one intermediate block (8 MiB in float64). Work is cut into slabs of about this size."""


def working_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that everything is computed in: float64, or float32 on devices that have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def result_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return float64 when any input is float64, otherwise float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def index_tensor(values: Sequence[int], device: torch.device) -> Tensor:
    """Return host integers as an index on `device`, without waiting for the device."""
    # Of the CPU by name: where a device is the default, the tensor would be made there, and the host would wait.
    return torch.tensor(values, dtype=torch.long, device="cpu").to(device, non_blocking=True)


def slabs(total: int, elements_each: int) -> Iterator[slice]:
    """Cut `range(total)` into slices that hold at most about `SLAB_ELEMENTS` elements."""
    step = max(1, SLAB_ELEMENTS // max(1, elements_each))
    for start in range(0, total, step):
        yield slice(start, min(total, start + step))


def triangular_factor(rows: Tensor) -> Tensor:
    """Return R of a QR factorization, so that R^T R = rows^T rows. (..., m, n) -> (..., min(m, n), n).

    Not finite for a matrix that is not: reflections carry NaN and Inf on, and never iterate.
    """
    factor: Tensor = torch.linalg.qr(rows, mode="r").R
    return factor


def singular_values_(matrix: Tensor) -> Tensor:
    """Return singular values, descending. (..., m, n) -> (..., min(m, n)). Overwrites `matrix` where it is not finite.

    NaN for a matrix that is not finite, or for which no driver converges.
    """
    broken = _clear_nonfinite_(matrix)
    try:
        values: Tensor = torch.linalg.svdvals(matrix)
    except LinAlgError:
        # One matrix fails the whole batch: factorize one by one, so that the others keep their values.
        each = [_stubborn_singular_values(one) for one in matrix.reshape(-1, *matrix.shape[-2:])]
        values = torch.stack(each).reshape(*matrix.shape[:-2], -1)
    return values.masked_fill_(broken.squeeze(-1), torch.nan)


def singular_vectors_(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return singular values, descending, and right singular vectors V. (..., m, n) -> (..., k), (..., n, k).

    k is min(m, n). Overwrites `matrix` where it is not finite. There, and where no driver converges, the values are NaN
    and V is 0.
    """
    broken = _clear_nonfinite_(matrix)
    try:
        _, values, right = torch.linalg.svd(matrix, full_matrices=False)
    except LinAlgError:
        each = [_stubborn_singular_vectors(one) for one in matrix.reshape(-1, *matrix.shape[-2:])]
        values, right = (
            torch.stack(parts).reshape(*matrix.shape[:-2], *parts[0].shape) for parts in zip(*each, strict=True)
        )
    unknown = broken | values.isnan().any(-1)[..., None, None]
    return values.masked_fill(unknown.squeeze(-1), torch.nan), right.mT.masked_fill(unknown, 0.0)


def _stubborn_singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    try:
        _, values, right = torch.linalg.svd(matrix, full_matrices=False)
    except LinAlgError:
        size = min(matrix.shape)
        return matrix.new_full((size,), torch.nan), matrix.new_zeros((size, matrix.shape[1]))
    return values, right


def _clear_nonfinite_(matrix: Tensor) -> Tensor:
    # A sum is NaN or Inf when an entry is. It may also overflow for entries near the end of the range: not finite, too.
    broken = ~torch.isfinite(matrix.sum((-2, -1), keepdim=True))
    matrix.masked_fill_(broken, 0.0)
    return broken


def _stubborn_singular_values(matrix: Tensor) -> Tensor:
    for driver in (torch.linalg.svdvals, _values_from_gram):
        try:
            return driver(matrix)
        except LinAlgError:
            continue
    return matrix.new_full((min(matrix.shape),), torch.nan)


def _values_from_gram(matrix: Tensor) -> Tensor:
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    squares: Tensor = torch.linalg.eigvalsh(wide @ wide.mT)
    return squares.clamp(min=0).sqrt().flip(-1)
