"""Defines causal softmax attention, from queries and keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.ess.gram_spectrum import BlockSpectra
from ess_monitor.ess.linalg import (
    SLAB_ELEMENTS,
    index_tensor,
    result_dtype,
    slabs,
    triangular_factor,
    working_dtype,
)
from ess_monitor.ess.operators.base import Operator
from ess_monitor.ess.operators.fields import (
    Tokens,
    all_finite,
    check_broadcast,
    check_floating,
    check_same_device,
    count,
    narrowed,
    pairs,
    per_head,
    window,
)
from ess_monitor.ess.segments import kept_by

if TYPE_CHECKING:
    from typing_extensions import Self


_ROWS_AT_ONCE = 128
"""Rows of T that are formed at once, at most, with the keys up to the last of them."""


@dataclass(frozen=True, eq=False)
class SoftmaxAttention(Operator):
    """Computes T = softmax(cap(scale q k^T) + mask) over the tokens up to and including the row's own.

    Attention keeps every key and value, so TSS at position i is i (B.2.5 of the paper). With a mask it is the number of
    them that a token from i on may still attend to: w - 1 in a window of w tokens. T[i:, :i] is formed for one position
    at a time; T as a whole never is. A row in which every key is masked is a row of zeros.

    Args:
        q: (batch, heads, length, dim), after rotary embeddings and norms: what the layer multiplies.
        k: (batch, key heads, length, dim). Key heads divide heads: query head h reads key head
            h // (heads / key heads). batch may be 1.
        scale: Factor on q k^T; dim**-0.5 by default.
        mask: Broadcastable to (batch, heads, length, length). bool: True keeps. Floating: added to the logits, where
            -inf and the smallest number of its dtype both mean masked. Causality is always applied on top.
        softcap: Bounds the logits before the mask is added: cap(z) = softcap tanh(z / softcap). None: cap(z) = z.
        sinks: (batch|1, heads|1, length|1), the logit of one more key for every row, with a value of zero. It takes its
            share of the softmax and gives nothing, so that a row may sum to less than 1. None, or -inf for some heads:
            no such key.

    Raises:
        OperatorError: The shapes do not fit together, `scale` is not finite, or `softcap` is not positive.

    Examples:
        >>> even = SoftmaxAttention(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8))  # every row is an average
        >>> even.singular_values([2]).round(decimals=4)  # rank 1: any average of the past is one number
        tensor([[[[0.5893, 0.0000]]]])
    """

    q: Tensor
    k: Tensor
    scale: float | None = None
    mask: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        check_floating("q", self.q, "(batch, heads, length, dim)", 4)
        check_floating("k", self.k, "(batch, key heads, length, dim)", 4)
        batch, heads, length = max(self.q.shape[0], self.k.shape[0]), *self.q.shape[1:3]
        if self.q.shape[2:] != self.k.shape[2:] or heads % self.k.shape[1]:
            raise OperatorError(
                f"q has shape {tuple(self.q.shape)} and k {tuple(self.k.shape)}; length and dim must be equal, and the "
                "number of key heads must divide the number of heads."
            )
        check_broadcast("samples", q=self.q.shape[0], k=self.k.shape[0])
        if self.scale is not None:
            scale = validation.real("scale", self.scale, hint="None stands for dim**-0.5", error=OperatorError)
            object.__setattr__(self, "scale", scale)
        if self.softcap is not None:
            hint = "None stands for no cap"
            softcap = validation.real("softcap", self.softcap, above=0, hint=hint, error=OperatorError)
            object.__setattr__(self, "softcap", softcap)
        if self.mask is not None:
            validation.instance("mask", self.mask, Tensor, hint="or None for no mask", error=OperatorError)
            if not (self.mask.dtype == torch.bool or self.mask.is_floating_point()):
                raise OperatorError(
                    f"mask has dtype {self.mask.dtype}; pass bool (True keeps) or floating (added to the logits)."
                )
            object.__setattr__(self, "mask", _broadcasting("mask", self.mask, (batch, heads, length, length)))
        if self.sinks is not None:
            check_floating("sinks", self.sinks, "(batch|1, heads|1, length|1)", 3)
            _broadcasting("sinks", self.sinks, (batch, heads, length))
        check_same_device(q=self.q, k=self.k, mask=self.mask, sinks=self.sinks)
        self._check_segments()

    norm = 1  # not annotated, so not a field
    """Of which norm every row of T is 1: the sum of its entries, unless they are given unit Euclidean norm."""

    @property
    def length(self) -> int:
        return self.q.shape[2]

    @property
    def capacity_grows(self) -> bool:
        return True

    def _capacity_at(self, position: int) -> int:
        return position

    def _capacities(self, positions: Sequence[int]) -> Tensor:
        if self.mask is None:
            return super()._capacities(positions)
        return self._stored(positions).float().mean((0, 1))

    def _stored(self, positions: Sequence[int]) -> Tensor:
        if self.mask is None:
            return super()._stored(positions)
        token = torch.arange(self.length, device=self.device)
        keep = kept_by(self.mask).expand(-1, -1, -1, self.length)
        if keep.shape[2] == 1:
            last_reader = torch.where(keep[:, :, 0], self.length - 1, -1)
        else:
            last_reader = torch.where(keep.tril(), token[:, None].int(), -1).amax(2)
        place = index_tensor(positions, self.device)[:, None]
        held = (last_reader[:, :, None] >= place) & (token < place)
        return held.sum(3)

    def finite(self) -> Tensor:
        finite = all_finite(self.q) & self._per_head(all_finite(self.k))
        for bias in (self.mask, self.sinks):
            if bias is not None and bias.is_floating_point():
                finite = finite & all_finite(bias, allows_minus_infinity=True)
        return finite.expand(self.batch, self.heads)

    @torch.no_grad()
    def _materialize(self) -> Tensor:
        rows = _Rows(self, slice(0, self.batch * self.heads))
        logits = rows.causal_logits(0, self.length)
        weights = (logits - rows.log_total(logits, 0)).exp()
        return per_head(weights, self.batch, self.heads).to(result_dtype(self.q.dtype, self.k.dtype))

    def _raw_singular_values(self, positions: Sequence[int], tolerance: float | None = None) -> Tensor:
        length, operators = self.length, self.batch * self.heads
        rank = max(min(i, length - i) for i in positions)
        out = torch.zeros((operators, len(positions), rank), dtype=working_dtype(self.device), device=self.device)
        spectra = BlockSpectra(operators, tolerance)
        smallest_first = sorted(enumerate(positions), key=lambda place: min(place[1], length - place[1]))
        start, largest = min(positions), max((length - i) * i for i in positions)
        at_once = (length - start) * length <= SLAB_ELEMENTS
        for slab in slabs(operators, (length - start) * length if at_once else largest):
            rows = _Rows(self, slab)
            block = rows.blocks_at_once(start) if at_once else rows.blocks_one_by_one(start)
            for p, i in smallest_first:
                values = spectra.values(slab, block(i))
                out[slab, p, : values.shape[-1]] = values
        return per_head(out, self.batch, self.heads)

    def _row_squares(self, position: int, start: int) -> tuple[Tensor, Tensor]:
        length, operators = self.length, self.batch * self.heads
        far, near = (torch.zeros(operators, dtype=working_dtype(self.device), device=self.device) for _ in range(2))
        for slab in slabs(operators, (length - start) * length):
            rows = _Rows(self, slab)
            for part in _row_blocks(start, length, slab.stop - slab.start):
                weights, total = rows.unnormalized(part.start, part.stop)
                for squares, columns in ((far, slice(position)), (near, slice(position, None))):
                    norms = torch.linalg.vector_norm(weights[..., columns], dim=-1, keepdim=True)
                    squares[slab] += (norms / total).square_().sum((1, 2))
        return per_head(far, self.batch, self.heads), per_head(near, self.batch, self.heads)

    def _unit_rows(self) -> SoftmaxAttention:
        return _UnitRowAttention(self.q, self.k, self.scale, self.mask, self.softcap)

    def _narrow(self, samples: Sequence[int] | None, heads: Sequence[int] | None, tokens: Tokens | None) -> Self:
        if isinstance(tokens, Tensor) or (tokens is not None and tokens.start > 0):
            few = self._narrow(samples, heads, None)
            return dataclasses.replace(few, sinks=few._weight_before(tokens))._narrow_tokens(tokens)
        key_heads = None if heads is None else _key_heads(heads, self.heads // self.k.shape[1])
        few = dataclasses.replace(
            self,
            q=narrowed(self.q, samples, heads, None),
            k=narrowed(self.k, samples, key_heads, None),
            mask=None if self.mask is None else narrowed(self.mask, samples, heads, None),
            sinks=None if self.sinks is None else narrowed(self.sinks, samples, heads, None),
            segments=None if self.segments is None else narrowed(self.segments, samples, None, None),
        )
        return few if tokens is None else few._narrow_tokens(tokens)

    def _narrow_tokens(self, tokens: Tokens) -> Self:
        """Return the operator of some neighboring tokens, whose rows see no other keys than theirs and the sinks."""
        mask = None if self.mask is None else window(window(self.mask, 2, tokens), 3, tokens)
        return dataclasses.replace(
            self,
            q=window(self.q, 2, tokens),
            k=window(self.k, 2, tokens),
            mask=mask,
            sinks=None if self.sinks is None else window(self.sinks, 2, tokens),
            segments=None if self.segments is None else window(self.segments, 2, tokens),
        )

    def _weight_before(self, tokens: Tokens) -> Tensor:
        """Return the sinks of all rows, where those of `tokens` also hold what the rows give to the keys before.

        So the rows stay as they are when these keys are left out.
        """
        members = self.batch * self.heads
        first, end = (tokens[0], self.length) if isinstance(tokens, Tensor) else (tokens.start, tokens.start)
        keys = torch.arange(end, device=self.device)
        sinks = torch.full((members, self.length), -torch.inf, dtype=working_dtype(self.device), device=self.device)
        if self.sinks is not None:
            sinks = pairs(self.sinks.expand(-1, -1, self.length), self.batch, self.heads).to(sinks.dtype).clone()
        for slab in slabs(members, count(tokens) * end):
            before = _Rows(self, slab).logits(tokens, end).masked_fill_(keys >= first, -torch.inf)
            sinks[slab, tokens] = torch.logaddexp(sinks[slab, tokens], before.logsumexp(-1))
        return per_head(sinks, self.batch, self.heads).to(self.result_dtype)

    def _per_head(self, k: Tensor) -> Tensor:
        """Repeat key heads for the query heads that read them: (., key heads, ...) -> (., heads, ...)."""
        group = self.heads // self.k.shape[1]
        return k if group == 1 else k.repeat_interleave(group, dim=1, output_size=self.heads)


@dataclass(frozen=True, eq=False)
class _UnitRowAttention(SoftmaxAttention):
    """Divides the exponentials of a row by their Euclidean norm. A sink, which scales the whole row, is in no entry."""

    norm = 2


def _broadcasting(name: str, tensor: Tensor, full: tuple[int, ...]) -> Tensor:
    """Return `tensor` with as many dimensions as `full`, each 1 or as large; otherwise raise `OperatorError`."""
    sizes = (1,) * (len(full) - tensor.dim()) + tuple(tensor.shape)
    if len(sizes) != len(full) or any(size not in (1, whole) for size, whole in zip(sizes, full, strict=True)):
        raise OperatorError(f"{name} has shape {tuple(tensor.shape)}, which does not broadcast to {full}.")
    return tensor[(None,) * (len(full) - tensor.dim())]


class _Rows:
    """Computes logits of G (sample, head) pairs, in the working dtype."""

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
            self.k = k[index_tensor(keys, attention.device)].to(dtype)
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

    def blocks_at_once(self, start: int) -> Callable[[int], Tensor]:
        """Form T[start:]; return a function that returns T[i:, :i] for i >= start: (G, length - i, i)."""
        members, length = self.q.shape[:2]
        weights = self.q.new_zeros((members, length - start, length))
        for rows in _row_blocks(start, length, members):
            each, total = self.unnormalized(rows.start, rows.stop)
            torch.div(each, total, out=weights[:, rows.start - start : rows.stop - start, : rows.stop])
        return lambda i: weights[:, i - start :, :i].clone()

    def blocks_one_by_one(self, start: int) -> Callable[[int], Tensor]:
        """Return the same function, which forms no more than a block."""
        normalizer = self.log_normalizer(start)
        return lambda i: _past(self, i, normalizer[:, i - start :])

    def causal_logits(self, start: int, stop: int) -> Tensor:
        """Return logits of rows start..stop and the keys up to each row's own: (G, stop - start, stop)."""
        logits, token = self.logits(slice(start, stop), stop), torch.arange(start, stop, device=self.q.device)
        logits[..., start:].masked_fill_(token > token[:, None], -torch.inf)
        return logits

    def log_normalizer(self, start: int) -> Tensor:
        """Return the log of the softmax denominators of the rows from `start` on: (G, length - start, 1)."""
        members, length = self.q.shape[:2]
        blocks = slabs(length - start, members * length)
        ranges = [(start + rows.start, start + rows.stop) for rows in blocks]
        totals = [self.log_total(self.causal_logits(row, stop), row) for row, stop in ranges]
        return torch.cat(totals, dim=1)

    def unnormalized(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return what rows start..stop of T are proportional to, (G, stop - start, stop), and what divides each row."""
        logits = self.causal_logits(start, stop)
        largest, sinks = logits.amax(-1, keepdim=True), self._sinks(start, stop)
        if sinks is not None:
            largest = torch.maximum(largest, sinks)
        largest.masked_fill_(largest == -torch.inf, 0.0)
        weights = logits.sub_(largest).exp_()
        if self.norm == 1:
            total = weights.sum(-1, keepdim=True)  # they are positive
        else:
            total = torch.linalg.vector_norm(weights, self.norm, dim=-1, keepdim=True)
        if sinks is not None:
            total += (sinks - largest).exp()
        return weights, total.masked_fill_(total == 0, 1.0)  # a row with nothing to attend to

    def log_total(self, logits: Tensor, start: int) -> Tensor:
        """Return the log of what divides the rows of exp(logits), of which the first is `start`: (G, rows, 1)."""
        total = (self.norm * logits).logsumexp(-1, keepdim=True) / self.norm
        sinks = self._sinks(start, start + logits.shape[1])
        if sinks is not None:
            total = torch.logaddexp(total, sinks)
        return total.masked_fill(total == -torch.inf, 0.0)  # a row with nothing to attend to: exp(-inf - 0) = 0

    def _sinks(self, start: int, stop: int) -> Tensor | None:
        return self.sinks if self.sinks is None or self.sinks.shape[1] == 1 else self.sinks[:, start:stop]


def _row_blocks(start: int, length: int, members: int) -> Iterator[slice]:
    """Cut the rows from `start` on into blocks, of which none has many keys that are later than its rows."""
    size = max(1, min(_ROWS_AT_ONCE, SLAB_ELEMENTS // (members * length)))
    for first in range(start, length, size):
        yield slice(first, min(first + size, length))


def _past(rows: _Rows, position: int, normalizer: Tensor) -> Tensor:
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


def _key_heads(heads: Sequence[int], group: int) -> Sequence[int]:
    """Return the key heads of query heads: one per group where whole groups are chosen, else one per query head."""
    whole = [head // group for head in heads[::group]]
    if list(heads) == [key * group + member for key in whole for member in range(group)]:
        return whole
    return [head // group for head in heads]
