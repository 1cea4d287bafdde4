"""Defines causal softmax attention, from queries and keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.ess.linalg import (
    SLAB_ELEMENTS,
    index_tensor,
    result_dtype,
    slabs,
    working_dtype,
)
from ess_monitor.ess.operators.attention_rows import AttentionRows, add_squares, past, row_blocks
from ess_monitor.ess.operators.base import Operator
from ess_monitor.ess.operators.blocks import BlockSpectra
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
        weights = AttentionRows(self, slice(0, self.batch * self.heads)).weights(0, self.length)
        return per_head(weights, self.batch, self.heads).to(result_dtype(self.q.dtype, self.k.dtype))

    def _raw_singular_values(self, positions: Sequence[int], tolerance: float | None = None) -> Tensor:
        if self._forms_rows_once(positions):
            return self._values_and_squares_of_rows(positions, tolerance, 0, self.length)[0]
        length, operators, first = self.length, self.batch * self.heads, min(positions)
        out, spectra = self._no_values(positions), BlockSpectra(operators, tolerance)
        smallest_first = sorted(enumerate(positions), key=lambda place: min(place[1], length - place[1]))
        for slab in slabs(operators, max((length - i) * i for i in positions)):
            rows = AttentionRows(self, slab)
            normalizer = rows.log_normalizer(first)
            for p, i in smallest_first:
                values = spectra.values(slab, past(rows, i, normalizer[:, i - first :]))
                out[slab, p, : values.shape[-1]] = values
        return per_head(out, self.batch, self.heads)

    def _row_squares(self, position: int, start: int) -> tuple[Tensor, Tensor]:
        length, operators = self.length, self.batch * self.heads
        far, near = self.q.new_zeros((2, operators), dtype=working_dtype(self.device))
        for slab in slabs(operators, (length - start) * length):
            rows = AttentionRows(self, slab)
            for part in row_blocks(start, length, slab.stop - slab.start):
                add_squares(rows.weights(part.start, part.stop), position, far[slab], near[slab])
        return per_head(far, self.batch, self.heads), per_head(near, self.batch, self.heads)

    def _raw_values_and_squares(
        self, positions: Sequence[int], tolerance: float | None, position: int, start: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if start < min(positions) or not self._forms_rows_once(positions):
            return super()._raw_values_and_squares(positions, tolerance, position, start)
        return self._values_and_squares_of_rows(positions, tolerance, position, start)

    def _forms_rows_once(self, positions: Sequence[int]) -> bool:
        return (self.length - min(positions)) * self.length <= SLAB_ELEMENTS

    def _values_and_squares_of_rows(
        self, positions: Sequence[int], tolerance: float | None, position: int, start: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        length, operators, first = self.length, self.batch * self.heads, min(positions)
        out, spectra = self._no_values(positions), BlockSpectra(operators, tolerance)
        far, near = out.new_zeros((2, operators))
        each = list(slabs(operators, (length - first) * length))
        # Rows that lie a power of two apart would share few lines of the caches.
        held = out.new_empty((each[0].stop, length - first, length + 8))[..., :length]
        for slab in each:
            rows, weights = AttentionRows(self, slab), held[: slab.stop - slab.start]
            for part in row_blocks(first, length, len(weights)):
                formed = rows.weights(part.start, part.stop)
                weights[:, part.start - first : part.stop - first, : part.stop] = formed
                if start < part.stop:
                    add_squares(formed[:, max(0, start - part.start) :], position, far[slab], near[slab])
            for i, values in spectra.values_at(slab, weights, first, positions):
                for p, position_of in enumerate(positions):
                    if position_of == i:
                        out[slab, p, : values.shape[-1]] = values
        return per_head(out, self.batch, self.heads), (
            per_head(far, self.batch, self.heads),
            per_head(near, self.batch, self.heads),
        )

    def _no_values(self, positions: Sequence[int]) -> Tensor:
        rank = max(min(i, self.length - i) for i in positions)
        return self.q.new_zeros((self.batch * self.heads, len(positions), rank), dtype=working_dtype(self.device))

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
            before = AttentionRows(self, slab).logits(tokens, end).masked_fill_(keys >= first, -torch.inf)
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


def _key_heads(heads: Sequence[int], group: int) -> Sequence[int]:
    """Return the key heads of query heads: one per group where whole groups are chosen, else one per query head."""
    whole = [head // group for head in heads[::group]]
    if list(heads) == [key * group + member for key in whole for member in range(group)]:
        return whole
    return [head // group for head in heads]
