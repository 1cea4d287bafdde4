"""Defines causal convolutions, plain and gated: short (LFM2, Canon) and long ones (Hyena, S4 as a convolution).

Number the outputs from position i on by a = 0, 1, ... and the inputs before it, latest first, by m = 0, 1, ...: the
entry is kernel[a + m + 1], constant along anti-diagonals, and zero once a + m + 1 reaches the number of taps K. So H_i
is a Hankel block of min(L - i, K - 1) rows and min(i, K - 1) columns, and zeros; column order does not matter here.

Shapes: G (sample, head) pairs, L length, K taps, P positions, R x M the block.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.ess.linalg import index_tensor, singular_values_, slabs, working_dtype
from ess_monitor.ess.operators.base import Operator
from ess_monitor.ess.operators.fields import (
    Tokens,
    check_batch_and_heads,
    check_floating,
    check_same_device,
    check_state_size,
    count,
    first,
    narrowed,
    pairs,
    per_head,
)
from ess_monitor.ess.positions import LONGEST
from ess_monitor.ess.realization.state_space import StateSpace, last_inputs

if TYPE_CHECKING:
    from typing_extensions import Self

_KERNEL = "(batch, heads, taps)"


@dataclass(frozen=True, eq=False)
class Convolution(Operator):
    """Applies the same filter at every position: T_ij = kernel[i - j].

    TSS at position i is min(i, taps - 1). H_i is a Hankel matrix with nothing outside its first taps - 1 rows and
    columns, so short filters cost next to nothing and positions with equally large blocks share one factorization.

    Args:
        kernel: (batch, heads or channels, taps); kernel[..., 0] multiplies the current input. batch is usually 1.
        length: Tokens per sequence; 0, the default, means the number of taps.
        state_size: Dimensions of the state that the kernel comes from (S4D: twice the number of complex ones), which
            are then the TSS. None, the default: the kernel is free.

    Raises:
        OperatorError: `kernel` has another shape, or `length` or `state_size` is negative.

    Examples:
        >>> delay = Convolution(torch.tensor([[[0.0, 0.0, 1.0]]]), length=10)  # y_t = u_{t-2}
        >>> delay.singular_values([5]).round(decimals=4)  # a delay of two tokens keeps two numbers
        tensor([[[[1., 1.]]]])
    """

    kernel: Tensor
    length: int = 0
    state_size: int | None = None

    def __post_init__(self) -> None:
        check_floating("kernel", self.kernel, _KERNEL, 3)
        check_state_size(self.state_size)
        hint = "0 stands for the number of taps"
        length = validation.whole("length", self.length, 0, LONGEST, hint=hint, error=OperatorError)
        object.__setattr__(self, "length", length or self.kernel.shape[2])
        self._check_segments()

    @property
    def capacity_grows(self) -> bool:
        return self.state_size is None and self.kernel.shape[2] >= self.length

    def _capacity_at(self, position: int) -> int:
        return _capacity(self.state_size, position, self.kernel.shape[2])

    @torch.no_grad()
    def _materialize(self) -> Tensor:
        return _toeplitz(self.kernel.to(self.result_dtype), self.length)

    def _state_space(self) -> StateSpace | None:
        one = self.kernel.new_ones((1, 1, 1))
        return _state_space(self.kernel, self.length, one, one)

    def _stored(self, positions: Sequence[int]) -> Tensor:
        return _stored(positions, self.kernel)

    def _raw_singular_values(self, positions: Sequence[int], tolerance: float | None = None) -> Tensor:
        values = _hankel_singular_values(self.kernel.flatten(0, 1), self.length, positions)
        return per_head(values, self.batch, self.heads)

    def _row_squares(self, position: int, start: int) -> tuple[Tensor, Tensor]:
        # An entry of lag m is in the rows from max(start, m) on, and in a column before `position` up to row
        # position + m - 1: the counts are whole numbers, and nothing is subtracted from a sum.
        lag = torch.arange(self.kernel.shape[2], device=self.device)
        first = lag.clamp(min=start)
        rows = (self.length - first).clamp(min=0)
        far = ((lag + position).clamp(max=self.length) - first).clamp(min=0)
        squares = self.kernel.to(working_dtype(self.device)).square()
        return (squares * far).sum(-1), (squares * (rows - far)).sum(-1)

    def _unit_rows(self) -> GatedConvolution:
        squares = self.kernel.to(working_dtype(self.device)).square().cumsum(-1)
        lags = torch.arange(self.length, device=self.device).clamp(max=self.kernel.shape[2] - 1)
        scale = self._inverse(squares[..., lags])
        return GatedConvolution(scale.new_ones((1, 1, self.length)), self.kernel, scale)

    def _narrow(self, samples: Sequence[int] | None, heads: Sequence[int] | None, tokens: Tokens | None) -> Self:
        kernel = _used_taps(narrowed(self.kernel, samples, heads, None), tokens)
        segments = None if self.segments is None else narrowed(self.segments, samples, None, tokens)
        length = self.length if tokens is None else count(tokens)
        return dataclasses.replace(self, kernel=kernel, length=length, segments=segments)


@dataclass(frozen=True, eq=False)
class GatedConvolution(Operator):
    """Applies a filter between two gates: T_ij = c_i kernel[i - j] b_j. TSS as in `Convolution`.

    Args:
        b: (batch, heads or channels, length), gate on the input. batch and heads may be 1.
        kernel: (batch, heads or channels, taps). batch and heads may be 1.
        c: (batch, heads or channels, length), gate on the output. batch and heads may be 1.
        state_size: As in `Convolution`.

    Raises:
        OperatorError: The shapes do not fit together.

    Examples:
        >>> open_gate = torch.ones(1, 1, 10)
        >>> delay = GatedConvolution(open_gate, torch.tensor([[[0.0, 0.0, 1.0]]]), 3 * open_gate)
        >>> delay.singular_values([5]).round(decimals=4)
        tensor([[[[3., 3.]]]])
    """

    b: Tensor
    kernel: Tensor
    c: Tensor
    state_size: int | None = None

    def __post_init__(self) -> None:
        check_state_size(self.state_size)
        check_floating("b", self.b, "(batch, heads, length)", 3)
        check_floating("kernel", self.kernel, _KERNEL, 3)
        check_floating("c", self.c, "(batch, heads, length)", 3)
        check_same_device(b=self.b, kernel=self.kernel, c=self.c)
        if self.b.shape[2] != self.c.shape[2]:
            raise OperatorError(f"b has length {self.b.shape[2]} and c {self.c.shape[2]}; they must be equal.")
        check_batch_and_heads(b=self.b, kernel=self.kernel, c=self.c)
        self._check_segments()

    @property
    def length(self) -> int:
        return self.b.shape[2]

    @property
    def capacity_grows(self) -> bool:
        return self.state_size is None and self.kernel.shape[2] >= self.length

    def _capacity_at(self, position: int) -> int:
        return _capacity(self.state_size, position, self.kernel.shape[2])

    @torch.no_grad()
    def _materialize(self) -> Tensor:
        dtype = self.result_dtype
        operator = self.c.to(dtype)[..., :, None] * _toeplitz(self.kernel.to(dtype), self.length)
        return operator * self.b.to(dtype)[..., None, :]

    def _state_space(self) -> StateSpace | None:
        return _state_space(self.kernel, self.length, self.b, self.c)

    def _stored(self, positions: Sequence[int]) -> Tensor:
        return _stored(positions, self.kernel)

    def _raw_singular_values(self, positions: Sequence[int], tolerance: float | None = None) -> Tensor:
        b, kernel, c = (pairs(tensor, self.batch, self.heads) for tensor in (self.b, self.kernel, self.c))
        values = _hankel_singular_values(kernel, self.length, positions, gates=(b, c))
        return per_head(values, self.batch, self.heads)

    def _row_squares(self, position: int, start: int) -> tuple[Tensor, Tensor]:
        length, dtype = self.length, working_dtype(self.device)
        b, kernel, c = (
            pairs(tensor, self.batch, self.heads).to(dtype).square() for tensor in (self.b, self.kernel, self.c)
        )
        taps = min(kernel.shape[1], length)
        newest_last = kernel[:, :taps].flip(-1)[..., None]
        is_far = torch.arange(length, device=self.device) < position
        # Of the inputs before `position` and of those after it: what each row sees, (G, 2, L, taps), as a view.
        inputs = torch.stack([b.masked_fill(~is_far, 0.0), b.masked_fill(is_far, 0.0)], dim=1)
        seen = F.pad(inputs, (taps - 1, 0)).unfold(-1, taps, 1)
        squares = torch.zeros((b.shape[0], 2), dtype=dtype, device=self.device)
        for group in slabs(b.shape[0], 2 * taps):
            for part in slabs(length - start, 2 * taps * (group.stop - group.start)):
                rows = slice(start + part.start, start + part.stop)
                outputs = (seen[group, :, rows] @ newest_last[group, None]).squeeze(-1)
                squares[group] += (outputs * c[group, None, rows]).sum(-1)
        far, near = per_head(squares, self.batch, self.heads).unbind(-1)
        return far, near

    def _unit_rows(self) -> GatedConvolution:
        dtype = working_dtype(self.device)
        b, kernel, c = (tensor.to(dtype).square() for tensor in (self.b, self.kernel, self.c))
        squares = GatedConvolution(b, kernel, c)
        each = []
        for group in slabs(self.heads, self.batch * self.length * min(self.length, self.kernel.shape[2])):
            heads = range(self.heads)[group]
            each.append(squares.select(heads=heads).materialize().sum(-1))
        return replace(self, c=self.c * self._inverse(torch.cat(each, dim=1)))

    def _narrow(self, samples: Sequence[int] | None, heads: Sequence[int] | None, tokens: Tokens | None) -> Self:
        b, c = (narrowed(gate, samples, heads, tokens) for gate in (self.b, self.c))
        kernel = _used_taps(narrowed(self.kernel, samples, heads, None), tokens)
        segments = None if self.segments is None else narrowed(self.segments, samples, None, tokens)
        return dataclasses.replace(self, b=b, kernel=kernel, c=c, segments=segments)


def _used_taps(kernel: Tensor, tokens: Tokens | None) -> Tensor:
    """Return the taps that reach no farther back than there are tokens."""
    return kernel if tokens is None else first(kernel, 2, count(tokens))


def _capacity(state_size: int | None, position: int, taps: int) -> int:
    """Return TSS: the state the kernel comes from, or else the last K - 1 inputs, or all so far."""
    return min(position, taps - 1) if state_size is None else state_size


def _state_space(kernel: Tensor, length: int, b: Tensor, c: Tensor) -> StateSpace | None:
    """Return the recurrence that holds the last K - 1 inputs; None where these are most of the sequence."""
    taps = kernel[..., :length]
    if 2 * (taps.shape[2] - 1) > length:
        return None
    dtype = working_dtype(kernel.device)
    return last_inputs(length, taps.to(dtype), b.to(dtype), c.to(dtype))


def _stored(positions: Sequence[int], kernel: Tensor) -> Tensor:
    return index_tensor([min(i, kernel.shape[2] - 1) for i in positions], kernel.device)[None, None]


def _hankel_singular_values(
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


def _toeplitz(kernel: Tensor, length: int) -> Tensor:
    """Return the operator of a kernel, (..., K) -> (..., L, L), with entry kernel[i - j] for i >= j."""
    lag = torch.arange(length, device=kernel.device)[:, None] - torch.arange(length, device=kernel.device)
    inside = (lag >= 0) & (lag < kernel.shape[-1])
    return torch.where(inside, kernel[..., lag.clamp(0, kernel.shape[-1] - 1)], 0.0)
