"""Forms rows of softmax attention, some at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ess_monitor.ess.linalg import SLAB_ELEMENTS, index_tensor, slabs, triangular_factor, working_dtype
from ess_monitor.ess.operators.fields import Tokens, pairs

if TYPE_CHECKING:
    from ess_monitor.ess.operators.attention import SoftmaxAttention

_ROWS_AT_ONCE = 128
"""Rows of T that are formed at once, at most, with the keys up to the last of them."""


class AttentionRows:
    """Computes logits and weights of G (sample, head) pairs, in the working dtype."""

    def __init__(self, attention: SoftmaxAttention, slab: slice) -> None:
        batch, heads = attention.batch, attention.heads
        dtype = working_dtype(attention.device)
        scale = attention.q.shape[-1] ** -0.5 if attention.scale is None else attention.scale
        self.q = pairs(attention.q, batch, heads)[slab].to(dtype) * scale
        key_heads = attention.k.shape[1]
        k = pairs(attention.k, batch, key_heads)
        if key_heads == heads:
            self.k = k[slab].to(dtype)
        else:  # the heads that read the same keys are neighbors
            keys = [pair * key_heads // heads for pair in range(slab.start, slab.stop)]
            few = k[keys[0] : keys[-1] + 1].to(dtype)
            self.k = few if len(few) == len(keys) else few[index_tensor([key - keys[0] for key in keys], few.device)]
        self._later: Tensor | None = None
        """(rows, rows), True above the diagonal: of as many rows as were formed last."""
        self.mask = None
        if attention.mask is not None:
            # A view: only the block of rows in use is ever copied.
            self.mask = attention.mask.expand(batch, heads, -1, -1)
        self.softcap = attention.softcap
        self.norm = attention.norm
        self.sinks = None
        if attention.sinks is not None:
            self.sinks = pairs(attention.sinks, batch, heads)[slab].to(dtype)[..., None]
        self.members = [divmod(pair, heads) for pair in range(slab.start, slab.stop)]

    def logits(self, tokens: Tokens, columns: int, first: int = 0) -> Tensor:
        """Return masked, not yet causal logits of some rows and the keys first..columns: (G, rows, columns - first)."""
        logits = self.q[:, tokens] @ self.k[:, first:columns].mT
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.mask is None:
            return logits
        rows = tokens if self.mask.shape[2] > 1 else slice(None)
        keys = slice(first, columns) if self.mask.shape[3] > 1 else slice(None)
        mask = torch.stack([self.mask[sample, head, rows, keys] for sample, head in self.members])
        if mask.dtype == torch.bool:
            return logits.masked_fill_(~mask, -torch.inf)
        logits = logits + mask
        return logits.masked_fill_(mask <= torch.finfo(mask.dtype).min, -torch.inf)

    def causal_logits(self, start: int, stop: int) -> Tensor:
        """Return logits of rows start..stop and the keys up to each row's own: (G, stop - start, stop)."""
        logits, size = self.logits(slice(start, stop), stop), stop - start
        if self._later is None or len(self._later) != size:
            self._later = torch.ones((size, size), dtype=torch.bool, device=logits.device).triu(1)
        logits[..., start:].masked_fill_(self._later, -torch.inf)
        return logits

    def log_normalizer(self, start: int) -> Tensor:
        """Return the log of the softmax denominators of the rows from `start` on: (G, length - start, 1)."""
        members, length = self.q.shape[:2]
        blocks = slabs(length - start, members * length)
        ranges = [(start + rows.start, start + rows.stop) for rows in blocks]
        totals = [self.log_total(self.causal_logits(row, stop), row) for row, stop in ranges]
        return torch.cat(totals, dim=1)

    def weights(self, start: int, stop: int) -> Tensor:
        """Return T[start:stop, :stop], (G, stop - start, stop); rows with nothing to attend to are 0."""
        logits, sinks = self.causal_logits(start, stop), self._sinks(start, stop)
        if sinks is None:
            weights = torch.softmax(logits, -1)
        else:
            sinks = sinks.expand(-1, stop - start, -1)
            weights = torch.softmax(torch.cat([logits, sinks], dim=-1), -1)[..., :-1]
        if self.mask is not None or sinks is not None:
            nothing = logits.amax(-1, keepdim=True) == -torch.inf
            weights.masked_fill_(nothing, 0.0)
        if self.norm == 1:
            return weights
        total = torch.linalg.vector_norm(weights, self.norm, dim=-1, keepdim=True)
        return weights.div_(total.masked_fill_(total == 0, 1.0))

    def log_total(self, logits: Tensor, start: int) -> Tensor:
        """Return the log of what divides the rows of exp(logits), of which the first is `start`: (G, rows, 1)."""
        total = (self.norm * logits).logsumexp(-1, keepdim=True) / self.norm
        sinks = self._sinks(start, start + logits.shape[1])
        if sinks is not None:
            total = torch.logaddexp(total, sinks)
        return total.masked_fill(total == -torch.inf, 0.0)  # a row with nothing to attend to: exp(-inf - 0) = 0

    def _sinks(self, start: int, stop: int) -> Tensor | None:
        return self.sinks if self.sinks is None or self.sinks.shape[1] == 1 else self.sinks[:, start:stop]


def row_blocks(start: int, length: int, members: int) -> Iterator[slice]:
    """Cut the rows from `start` on into blocks, of which none has many keys that are later than its rows."""
    size = max(1, min(_ROWS_AT_ONCE, SLAB_ELEMENTS // (members * length)))
    for first in range(start, length, size):
        yield slice(first, min(first + size, length))


def add_squares(weights: Tensor, position: int, far: Tensor, near: Tensor) -> None:
    """Add the squares of some rows of T, (G, rows, columns), before `position` to `far` and the others to `near`."""
    for squares, columns in ((far, slice(position)), (near, slice(position, None))):
        squares += torch.linalg.vector_norm(weights[..., columns], dim=-1).square_().sum(1)


def past(rows: AttentionRows, position: int, normalizer: Tensor) -> Tensor:
    """Return H_i of G operators, (G, length - i, i); where it is large and wide a matrix of the same singular values.

    That is L of H_i = L Q, (G, length - i, length - i), from some columns after the others.
    """
    length = rows.q.shape[1]
    tokens, height = slice(position, length), length - position
    if position <= 2 * height or position * height <= SLAB_ELEMENTS:
        return (rows.logits(tokens, position) - normalizer).exp_()
    factor = rows.q.new_zeros((rows.q.shape[0], 0, height))
    for columns in slabs(position, height):
        part = (rows.logits(tokens, columns.stop, columns.start) - normalizer).exp_()
        factor = triangular_factor(torch.cat([factor, part.mT], dim=1))
    return factor.mT
