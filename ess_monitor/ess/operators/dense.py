"""Defines the operator that is given as a matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.ess.linalg import slabs, working_dtype
from ess_monitor.ess.operators.base import Operator
from ess_monitor.ess.operators.blocks import BlockSpectra
from ess_monitor.ess.operators.fields import (
    Tokens,
    check_floating,
    check_state_size,
    narrowed,
    pairs,
    per_head,
    window,
)

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class DenseOperator(Operator):
    """Holds T as a matrix: the fallback for layers whose structure is not known, at O(L^3) per position.

    With `block_size` d > 1 a token owns d rows and columns (layers that mix channels inside the recurrence), and
    H_i = T[d i:, :d i]. T must be block lower triangular; this is not checked, and nothing above the diagonal is read.
    Nothing is known of how T was realized, so TSS at position i is that of the trivial realization, d i.

    Args:
        T: (d L, d L), (heads, d L, d L) or (batch, heads, d L, d L); missing leading dimensions are 1.
        block_size: Rows per token, d; at least 1 and a divisor of T's size.
        state_size: Dimensions of the state that T comes from, which are then the TSS. None: they are not known.

    Raises:
        OperatorError: T is not square, or `block_size` does not divide its size.

    Examples:
        >>> DenseOperator(torch.ones(6, 6).tril(), block_size=2).singular_values([1]).round(decimals=4)  # of rank 1
        tensor([[[[2.8284, 0.0000]]]])
    """

    T: Tensor
    block_size: int = 1
    state_size: int | None = None

    def __post_init__(self) -> None:
        shape = "(d L, d L), (heads, d L, d L) or (batch, heads, d L, d L)"
        if not isinstance(self.T, Tensor) or self.T.dim() not in (2, 3, 4):
            raise OperatorError(f"T is {validation.shown(self.T)}, expected one of shape {shape}.")
        object.__setattr__(self, "T", self.T[(None,) * (4 - self.T.dim())])
        check_floating("T", self.T, shape, 4)
        validation.whole("block_size", self.block_size, 1, error=OperatorError)
        check_state_size(self.state_size)
        rows, columns = self.T.shape[2:]
        if rows != columns or rows % self.block_size:
            raise OperatorError(
                f"T has {rows} x {columns} entries and block_size={self.block_size}; T must be square and block_size a "
                "divisor of its size, from 1 up."
            )
        self._check_segments()

    @property
    def length(self) -> int:
        return self.T.shape[2] // self.block_size

    @property
    def capacity_grows(self) -> bool:
        return self.state_size is None

    def _capacity_at(self, position: int) -> int:
        return self.block_size * position if self.state_size is None else self.state_size

    def finite(self) -> Tensor:
        # What lies above the diagonal is never read, so it may hold anything.
        return torch.isfinite(self.T.tril(-1)).flatten(2).all(-1)

    def _materialize(self) -> Tensor:
        return self.T.detach().to(self.result_dtype)

    def _raw_singular_values(self, positions: Sequence[int], tolerance: float | None = None) -> Tensor:
        d, length = self.block_size, self.length
        operator = pairs(self.T, self.batch, self.heads)
        dtype = working_dtype(self.device)
        rank = d * max(min(i, length - i) for i in positions)
        out = torch.zeros((operator.shape[0], len(positions), rank), dtype=dtype, device=self.device)
        spectra = BlockSpectra(operator.shape[0], tolerance)
        for p, i in sorted(enumerate(positions), key=lambda place: min(place[1], length - place[1])):
            for group in slabs(operator.shape[0], d * d * i * (length - i)):
                block = torch.empty_like(operator[group, d * i :, : d * i], dtype=dtype)
                values = spectra.values(group, block.copy_(operator[group, d * i :, : d * i]))
                out[group, p, : values.shape[-1]] = values
        return per_head(out, self.batch, self.heads)

    def _row_squares(self, position: int, start: int) -> tuple[Tensor, Tensor]:
        d, length = self.block_size, self.length
        operator = pairs(self.T, self.batch, self.heads)
        dtype = working_dtype(self.device)
        token = torch.arange(d * length, device=self.device) // d
        far, near = (torch.zeros(operator.shape[0], dtype=dtype, device=self.device) for _ in range(2))
        for group in slabs(operator.shape[0], d * d * length):
            for part in slabs(length - start, d * d * length * (group.stop - group.start)):
                rows = slice(d * (start + part.start), d * (start + part.stop))
                squares = operator[group, rows].to(dtype).square()
                squares.masked_fill_(token > token[rows, None], 0.0)
                far[group] += squares[..., : d * position].sum((1, 2))
                near[group] += squares[..., d * position :].sum((1, 2))
        return per_head(far, self.batch, self.heads), per_head(near, self.batch, self.heads)

    def _unit_rows(self) -> DenseOperator:
        token = torch.arange(self.T.shape[2], device=self.device) // self.block_size
        rows = self.T.to(working_dtype(self.device)).masked_fill(token > token[:, None], 0.0)
        squares = rows.square_().sum(-1).reshape(*rows.shape[:2], self.length, self.block_size)
        scale = self._inverse(squares.mean(-1)).repeat_interleave(self.block_size, 2)
        return DenseOperator(self.T * scale[..., None], self.block_size)

    def _narrow(self, samples: Sequence[int] | None, heads: Sequence[int] | None, tokens: Tokens | None) -> Self:
        d = self.block_size
        rows: Tokens | None = None
        if isinstance(tokens, Tensor):
            rows = (d * tokens[:, None] + torch.arange(d, device=tokens.device)).flatten()
        elif tokens is not None:
            rows = slice(d * tokens.start, d * tokens.stop)
        T = window(narrowed(self.T, samples, heads, rows), 3, rows)
        segments = None if self.segments is None else narrowed(self.segments, samples, None, tokens)
        return dataclasses.replace(self, T=T, segments=segments)
