"""Computes singular values of H_i for (gated) convolutions.

Number the outputs from position i on by a = 0, 1, ... and the inputs before it, latest first, by m = 0, 1, ...: the
entry is kernel[a + m + 1], constant along anti-diagonals, and zero once a + m + 1 reaches the number of taps K. So H_i
is a Hankel block of min(L - i, K - 1) rows and min(i, K - 1) columns, and zeros; column order does not matter here.

Shapes: G (sample, head) pairs, L length, K taps, P positions, R x M the block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ess_monitor.ess.linalg import index_tensor, singular_values_, slabs, working_dtype


def hankel_singular_values(
    kernel: Tensor, length: int, positions: Sequence[int], gates: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Return (G, P, rank) for a (G, K) kernel and optional gates b, c of (G, L), in the working dtype, zero-padded."""
    members, taps = kernel.shape
    dtype = working_dtype(kernel.device)
    shapes: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for p, i in enumerate(positions):
        shapes[min(length - i, taps - 1), min(i, taps - 1)].append(p)
    rank = max(1, *(min(shape) for shape in shapes))
    out = torch.zeros((members, len(positions), rank), dtype=dtype, device=kernel.device)
    if taps == 1:  # no past, no memory; a column of zeros stays, where NaN of a broken kernel is shown
        return out
    for (rows, columns), members_of_shape in shapes.items():
        # Without gates every position of one shape has the same block: factorize it once.
        distinct = members_of_shape if gates is not None else members_of_shape[:1]
        for group in slabs(members, rows * columns):
            hankel = _hankel(kernel[group].to(dtype), rows, columns)
            for part in slabs(len(distinct), (group.stop - group.start) * rows * columns):
                blocks = hankel[:, None].repeat(1, part.stop - part.start, 1, 1)
                if gates is not None:
                    at = index_tensor([positions[p] for p in distinct[part]], kernel.device)[:, None]
                    reads = at + torch.arange(rows, device=kernel.device)
                    writes = at - 1 - torch.arange(columns, device=kernel.device)
                    blocks *= gates[1][group][:, reads, None].to(dtype)
                    blocks *= gates[0][group][:, writes].unsqueeze(-2).to(dtype)
                values = singular_values_(blocks)
                where = distinct[part] if gates is not None else members_of_shape
                out[group, index_tensor(where, kernel.device), : min(rows, columns)] = values
    return out


def _hankel(kernel: Tensor, rows: int, columns: int) -> Tensor:
    """Return a view of the padded kernel, (G, K) -> (G, R, M), with entry kernel[a + m + 1]."""
    used = kernel[:, 1 : rows + columns]
    return F.pad(used, (0, rows + columns - 1 - used.shape[-1])).unfold(-1, columns, 1)


def toeplitz(kernel: Tensor, length: int) -> Tensor:
    """Return the operator of a kernel, (..., K) -> (..., L, L), with entry kernel[i - j] for i >= j."""
    lag = torch.arange(length, device=kernel.device)[:, None] - torch.arange(length, device=kernel.device)
    inside = (lag >= 0) & (lag < kernel.shape[-1])
    return torch.where(inside, kernel[..., lag.clamp(0, kernel.shape[-1] - 1)], 0.0)
