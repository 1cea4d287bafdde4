"""Defines causal convolutions, plain and gated: short (LFM2, Canon) and long ones (Hyena, S4 as a convolution)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.ess.hankel import hankel_singular_values, toeplitz
from ess_monitor.ess.operators.base import Operator
from ess_monitor.ess.operators.fields import (
    check_batch_and_heads,
    check_floating,
    check_same_device,
    narrowed,
    pairs,
    per_head,
)
from ess_monitor.ess.positions import LONGEST

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

    Raises:
        OperatorError: `kernel` has another shape, or `length` is negative.

    Example:
        >>> delay = Convolution(torch.tensor([[[0.0, 0.0, 1.0]]]), length=10)  # y_t = u_{t-2}
        >>> delay.singular_values([5]).round(decimals=4)  # a delay of two tokens keeps two numbers
        tensor([[[[1., 1.]]]])
    """

    kernel: Tensor
    length: int = 0

    def __post_init__(self) -> None:
        check_floating("kernel", self.kernel, _KERNEL, 3)
        hint = "0 stands for the number of taps"
        length = validation.whole("length", self.length, 0, LONGEST, hint=hint, error=OperatorError)
        object.__setattr__(self, "length", length or self.kernel.shape[2])

    @property
    def capacity_grows(self) -> bool:
        return self.kernel.shape[2] >= self.length

    def _capacity_at(self, position: int) -> int:
        return min(position, self.kernel.shape[2] - 1)  # the last K - 1 inputs, or all so far

    @torch.no_grad()
    def materialize(self) -> Tensor:
        return toeplitz(self.kernel.to(self.result_dtype), self.length)

    def _raw_singular_values(self, positions: Sequence[int]) -> Tensor:
        values = hankel_singular_values(self.kernel.flatten(0, 1), self.length, positions)
        return per_head(values, self.batch, self.heads)

    def _narrow(self, samples: Sequence[int] | None, heads: Sequence[int] | None, length: int | None) -> Self:
        kernel = narrowed(self.kernel, samples, heads, length)
        return type(self)(kernel, self.length if length is None else length)


@dataclass(frozen=True, eq=False)
class GatedConvolution(Operator):
    """Applies a filter between two gates: T_ij = c_i kernel[i - j] b_j. TSS as in `Convolution`.

    Args:
        b: (batch, heads or channels, length), gate on the input. batch and heads may be 1.
        kernel: (batch, heads or channels, taps). batch and heads may be 1.
        c: (batch, heads or channels, length), gate on the output. batch and heads may be 1.

    Raises:
        OperatorError: The shapes do not fit together.

    Example:
        >>> open_gate = torch.ones(1, 1, 10)
        >>> delay = GatedConvolution(open_gate, torch.tensor([[[0.0, 0.0, 1.0]]]), 3 * open_gate)
        >>> delay.singular_values([5]).round(decimals=4)
        tensor([[[[3., 3.]]]])
    """

    b: Tensor
    kernel: Tensor
    c: Tensor

    def __post_init__(self) -> None:
        check_floating("b", self.b, "(batch, heads, length)", 3)
        check_floating("kernel", self.kernel, _KERNEL, 3)
        check_floating("c", self.c, "(batch, heads, length)", 3)
        check_same_device(b=self.b, kernel=self.kernel, c=self.c)
        if self.b.shape[2] != self.c.shape[2]:
            raise OperatorError(f"b has length {self.b.shape[2]} and c {self.c.shape[2]}; they must be equal.")
        check_batch_and_heads(b=self.b, kernel=self.kernel, c=self.c)

    @property
    def length(self) -> int:
        return self.b.shape[2]

    @property
    def capacity_grows(self) -> bool:
        return self.kernel.shape[2] >= self.length

    def _capacity_at(self, position: int) -> int:
        return min(position, self.kernel.shape[2] - 1)

    @torch.no_grad()
    def materialize(self) -> Tensor:
        dtype = self.result_dtype
        operator = self.c.to(dtype)[..., :, None] * toeplitz(self.kernel.to(dtype), self.length)
        return operator * self.b.to(dtype)[..., None, :]

    def _raw_singular_values(self, positions: Sequence[int]) -> Tensor:
        b, kernel, c = (pairs(tensor, self.batch, self.heads) for tensor in (self.b, self.kernel, self.c))
        values = hankel_singular_values(kernel, self.length, positions, gates=(b, c))
        return per_head(values, self.batch, self.heads)
