"""Computes how a layer makes the state of its recurrence smaller: by one change of basis for all inputs and tokens.

A realization (`ess_monitor.ess.realize`) has matrices of its own at each token and for each input. A layer has
parameters: of n state dimensions it can keep r, each with its decay, and scale what is read from them; where the decay
of a head is one number, A = a I, it commutes with every basis, and any r directions can be kept.

Shapes: B batch, H heads, G groups of neighboring heads that share a basis, L length, n state, r state dimensions kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ess_monitor.ess.linalg import slabs, working_dtype
from ess_monitor.ess.operators.recurrence import DiagonalRecurrence
from ess_monitor.ess.realization.energy import squared_norm


@dataclass(frozen=True, eq=False)
class StateProjection:
    """Holds the smaller state of each group of heads: b' = writes b, c' = reads c, decays of the dimensions kept."""

    writes: Tensor
    """(G, r, n)."""
    reads: Tensor
    """(G, r, n); reads^T writes is the projection of the state."""
    kept: Tensor | None
    """(G, r): the dimensions whose decays are kept. None where the decay is one number, and directions are kept."""

    def of(self, recurrence: DiagonalRecurrence) -> DiagonalRecurrence:
        """Return the recurrence with the smaller state, in the working dtype."""
        decay, b, c = _fields(recurrence)
        if self.kept is not None and decay.shape[3] > 1:
            index = _by_head(self.kept, decay.shape[1])[None, :, None]
            decay = decay.expand(-1, index.shape[1], -1, recurrence.state_size)
            decay = decay.gather(3, index.expand(*decay.shape[:3], -1))
        return DiagonalRecurrence(
            decay, b @ _by_head(self.writes, b.shape[1]).mT, c @ _by_head(self.reads, c.shape[1]).mT
        )

    def lost(self, recurrence: DiagonalRecurrence) -> tuple[Tensor, Tensor]:
        """Return ||T - T'||_F^2 and ||T||_F^2 of every operator, (B, H) each."""
        smaller = self.of(recurrence)
        decay, b, c = _fields(recurrence)
        heads = max(decay.shape[1], smaller.log_decay.shape[1])
        decays = [decay, smaller.log_decay]
        if decay.shape[3] > 1:
            decays = [each.expand(-1, heads, -1, -1) for each in decays]
        else:
            decays = decays[:1]
        both = DiagonalRecurrence(torch.cat(decays, -1), _joined(b, smaller.b), _joined(c, -smaller.c))
        shape = (recurrence.batch, recurrence.heads)
        return squared_norm(both).expand(shape), squared_norm(recurrence).expand(shape)


def first_dimensions(recurrences: Sequence[DiagonalRecurrence], groups: int, size: int) -> StateProjection:
    """Keep the first dimensions of each state, and scale what is read from them."""
    products = _products(recurrences, groups)
    return _selection(products, torch.arange(size).expand(groups, -1), scales=True)


def best_dimensions(
    recurrences: Sequence[DiagonalRecurrence], groups: int, size: int, *, scales: bool
) -> StateProjection:
    """Keep the dimensions without which T changes least: one after another is left out.

    T is a sum of T^(n) over state dimensions. With G_nm = <T^(n), T^(m)> those that are left out cost the sum of their
    block of G; where what is read from the others is scaled (`scales`), by least squares, what these cannot stand in
    for.

    Args:
        recurrences: operators of the calibration data, all with the same heads.
        groups: of heads that share their dimensions.
        size: dimensions to keep, r.
        scales: whether reads may be scaled.
    """
    products = _products(recurrences, groups)
    chosen = _without_the_least_regressed if scales else _without_the_least
    return _selection(products, torch.stack([chosen(each, size) for each in products]), scales=scales)


def balanced_directions(recurrences: Sequence[DiagonalRecurrence], groups: int, size: int) -> StateProjection:
    """Keep the directions of the state that are written to and read from most: balanced truncation of A = a I.

    The Gramians are those of all tokens together: P of what is in the state, Q of what is read from it later. With
    P = X X^T, Q = Y Y^T and Y^T X = U S V^T they are writes = S^(-1/2) U^T Y^T and reads = S^(-1/2) V^T X^T, for the r
    largest of S.
    """
    written, read = (sum(parts) for parts in zip(*(_gramians(each, groups) for each in recurrences), strict=True))
    X, Y = _root(written), _root(read)
    U, S, Vh = torch.linalg.svd(Y.mT @ X)
    scale = S[:, :size].clamp(min=torch.finfo(S.dtype).eps * S[:, :1]).rsqrt()[..., None]
    scale = torch.where(scale.isfinite(), scale, 0.0)  # of operators that are 0
    return StateProjection(scale * (U[..., :size].mT @ Y.mT), scale * (Vh[:, :size] @ X.mT), None)


def _fields(recurrence: DiagonalRecurrence) -> tuple[Tensor, Tensor, Tensor]:
    dtype = working_dtype(recurrence.device)
    return recurrence.log_decay.to(dtype), recurrence.b.to(dtype), recurrence.c.to(dtype)


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    """(G, ...) to (H, ...), of at least as many heads as there are groups."""
    return tensor.repeat_interleave(max(1, heads // tensor.shape[0]), 0)


def _joined(first: Tensor, second: Tensor) -> Tensor:
    heads = max(first.shape[1], second.shape[1])
    return torch.cat([each.expand(-1, heads, -1, -1) for each in (first, second)], -1)


def _tokens(recurrence: DiagonalRecurrence) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield decays, b and c of some samples: (B, H, L, n | 1), (B, H, L, n), (B, H, L, n)."""
    heads, state = recurrence.heads, recurrence.state_size
    for samples in slabs(recurrence.batch, heads * state * state):
        log_decay, b, c = _fields(recurrence.select(samples=samples, heads=range(heads)))
        size = (samples.stop - samples.start, heads, recurrence.length, -1)
        yield log_decay.exp().expand(size), b.expand(size), c.expand(size)


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """Sum (B, H, ...) over samples and the heads of each group: (G, ...)."""
    summed = tensor.sum(0)
    return summed.reshape(groups, -1, *summed.shape[1:]).sum(1)


def _products(recurrences: Sequence[DiagonalRecurrence], groups: int) -> Tensor:
    """Return <T^(n), T^(m)>, summed over samples and the heads of each group, (G, n, n)."""
    found = []
    for recurrence in recurrences:
        for decay, b, c in _tokens(recurrence):
            inside = b.new_zeros((*b.shape[:2], b.shape[3], b.shape[3]))
            sums = torch.zeros_like(inside)
            for i in range(b.shape[2]):
                kept = decay[:, :, i]
                inside = kept[..., :, None] * kept[..., None, :] * inside + _outer(b[:, :, i])
                sums += _outer(c[:, :, i]) * inside
            found.append(_by_group(sums, groups))
    return torch.stack(found).sum(0)


def _gramians(recurrence: DiagonalRecurrence, groups: int) -> tuple[Tensor, Tensor]:
    """Return the Gramians of what is in the state and of what is read later, summed over tokens, (G, n, n) each."""
    found = []
    for decay, b, c in _tokens(recurrence):
        squares = decay[..., :1, None].square()
        written, read = [torch.zeros_like(_outer(b[:, :, 0])) for _ in range(2)]
        inside, later = torch.zeros_like(written), torch.zeros_like(read)
        last = b.shape[2] - 1
        for i in range(last + 1):
            inside = squares[:, :, i] * inside + _outer(b[:, :, i])
            written += inside
            after = squares[:, :, last - i + 1] if i else torch.zeros_like(squares[:, :, 0])
            later = after * later + _outer(c[:, :, last - i])
            read += later
        found.append((_by_group(written, groups), _by_group(read, groups)))
    written, read = (torch.stack(each).sum(0) for each in zip(*found, strict=True))
    return written, read


def _outer(vectors: Tensor) -> Tensor:
    return vectors[..., :, None] * vectors[..., None, :]


def _root(gramian: Tensor) -> Tensor:
    """Return X with X X^T = gramian."""
    values, vectors = torch.linalg.eigh(gramian)
    root: Tensor = vectors * values.clamp(min=0.0).sqrt()[..., None, :]
    return root


def _without_the_least(products: Tensor, size: int) -> Tensor:
    """Return the dimensions that stay where one after another is left out, and nothing else is changed."""
    kept = torch.ones(len(products), dtype=torch.bool)
    for _ in range(len(products) - size):
        left_out = products[:, ~kept].sum(1)  # <T^(n), what is left out so far>
        costs = products.diagonal() + 2 * left_out
        kept[costs.masked_fill(~kept, torch.inf).argmin()] = False
    return kept.nonzero()[:, 0]


def _without_the_least_regressed(products: Tensor, size: int) -> Tensor:
    """Return the same where the others are scaled each time: a regression that loses its least regressor."""
    count = len(products)
    kept = torch.arange(count)
    eye = torch.eye(count, dtype=products.dtype)
    inverse = torch.linalg.inv(products + _ridge(products) * eye)
    whole = products.sum(1)
    while len(kept) > size:
        scales = inverse @ whole[kept]
        costs = scales.square() / inverse.diagonal()
        least = int(costs.argmin())
        others = torch.arange(len(kept)) != least
        column = inverse[others, least]
        inverse = inverse[others][:, others] - torch.outer(column, column) / inverse[least, least]
        kept = kept[others]
    return kept


def _ridge(products: Tensor) -> float:
    """Return what is added to the diagonal: dimensions may hold the same, or nothing."""
    return 1e-10 * float(products.diagonal().mean()) or 1.0


def _selection(products: Tensor, kept: Tensor, *, scales: bool) -> StateProjection:
    groups, state = products.shape[:2]
    writes = torch.nn.functional.one_hot(kept, state).to(products.dtype)
    reads = writes.clone()
    if scales:
        for group in range(groups):
            own = kept[group]
            block = products[group][own][:, own] + _ridge(products[group]) * torch.eye(len(own), dtype=products.dtype)
            reads[group] *= torch.linalg.solve(block, products[group][own].sum(1))[:, None]
    return StateProjection(writes, reads, kept)
