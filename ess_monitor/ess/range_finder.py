"""Computes singular values of matrices that are known by their products alone, with a randomized range finder.

Products with Gaussian vectors span the range of J up to an error e (Halko, Martinsson and Tropp, SIAM Review 2011,
algorithm 4.2). With an orthonormal basis Q of that span, sigma(Q^T J)^2 <= sigma(J)^2 <= sigma(Q^T J)^2 + e^2.
The span grows until e is a tenth of the tolerance, or to its largest size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ess_monitor.ess.linalg import singular_values_

BLOCK = 16
"""Vectors of a step, of which the last also check the span of those before."""
_FACTOR = 2 * math.sqrt(2 / math.pi)
"""Times the largest norm of what `BLOCK` vectors leave outside of the span: a bound of the spectral norm, which fails
with probability 2^-BLOCK (their lemma 4.1)."""

Product = Callable[[Tensor], Tensor]
"""Vectors (k, batch, n) -> their products (k, batch, m)."""


class Found(NamedTuple):
    """Holds what the span shows of each matrix."""

    values: Tensor
    """(batch, rank): singular values of Q^T J, descending; lower bounds of those of J."""
    error: Tensor
    """(batch,): e, a bound of ||J - Q Q^T J||; infinite where the span ended before it was checked."""

    def at_least(self, tolerance: float) -> Tensor:
        """Return (batch,): a lower bound of how many singular values of J are above the tolerance."""
        return (self.values > tolerance).sum(-1)

    def at_most(self, tolerance: float) -> Tensor:
        """Return (batch,): an upper bound of the same; infinite where what is outside of the span may be above it."""
        bound = ((self.values.square() + self.error[:, None].square()).sqrt() > tolerance).sum(-1).double()
        return bound.masked_fill(self.error > tolerance, math.inf)


def singular_values_by_products(
    product: Product, transposed: Product, shape: tuple[int, int, int], like: Tensor, tolerance: float, largest: int
) -> Found:
    """Return the singular values of matrices J: those above the tolerance, and some of the others.

    Args:
        product: J times vectors.
        transposed: J^T times vectors.
        shape: (batch, m, n) of the matrices.
        like: a tensor with their dtype and device.
        tolerance: tau, above which all singular values are to be found.
        largest: columns of the span at most.

    Examples:
        >>> J = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0]).double())[None]
        >>> def product(v): return v @ J.mT[0]
        >>> found = singular_values_by_products(product, product, (1, 5, 5), J, 1e-3, 64)
        >>> found.values.round(decimals=6), found.at_least(1e-3), found.at_most(1e-3)
        (tensor([[3., 2., 1., 0., 0.]], dtype=torch.float64), tensor([3]), tensor([3.], dtype=torch.float64))
    """
    batch, rows, columns = shape
    full = min(rows, columns)
    generator = torch.Generator().manual_seed(0)  # of its own: the training's numbers are not touched
    seen = like.new_zeros((batch, rows, 0))
    basis = like.new_zeros((batch, rows, 0))
    error = like.new_full((batch,), math.inf)
    while basis.shape[2] < full:
        size = basis.shape[2]
        block = max(BLOCK, size // 4)
        vectors = torch.randn((block, batch, columns), generator=generator, dtype=torch.float64).to(like)
        images = product(vectors).permute(1, 2, 0)
        if size:
            outside = images - basis @ (basis.mT @ images)
            error = _FACTOR * outside.norm(dim=1).amax(-1)
            if bool((error <= 0.1 * tolerance).all()) or size >= largest:
                break
        seen = torch.cat([seen, images], dim=2)[:, :, :full]
        basis = torch.linalg.qr(seen).Q
    if basis.shape[2] == full:
        error = torch.zeros_like(error)
    found = transposed(basis.permute(2, 0, 1).contiguous()).transpose(0, 1)
    return Found(singular_values_(found.contiguous()), error)
