"""Recurrences with a diagonal transition matrix: LA, WLA, GLA, S4D, S6, Mamba, RetNet, RG-LRU and their like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ess_monitor.errors import OperatorError
from ess_monitor.ess.gramian import recurrence_singular_values
from ess_monitor.ess.linalg import result_dtype, working_dtype
from ess_monitor.ess.operators.base import Operator
from ess_monitor.ess.operators.fields import all_finite, check_floating, check_same_device, common_size, first, take

if TYPE_CHECKING:
    from typing_extensions import Self


def resets(log_decay: Tensor) -> Tensor:
    """Log decay of A := I, (batch|1, heads|1, length|1, 1): 0, and -inf at tokens where nothing is kept at all.

    A decay that is the same at every token separates no sequences.
    """
    if log_decay.shape[2] == 1:
        return log_decay.new_zeros((*log_decay.shape[:2], 1, 1))
    nothing_kept = log_decay.isneginf().all(-1, keepdim=True)
    return torch.zeros_like(log_decay[..., :1]).masked_fill_(nothing_kept, -torch.inf)


@dataclass(frozen=True, eq=False)
class DiagonalRecurrence(Operator):
    """s_t = diag(exp(log_decay_t)) s_{t-1} + b_t u_t,  y_t = c_t . s_t: the state is updated before it is read.

    T_ij = sum_n c_i[n] exp(log_decay_{j+1}[n] + ... + log_decay_i[n]) b_j[n] for i >= j. TSS is the state size n.
    Singular values cost O(L n^2 + P n^3) for P positions and never form T (`ess_monitor.ess.gramian`).

    Args:
        log_decay: (batch, heads, length, state), logarithm of A's diagonal; -inf is a decay of exactly 0. Any dimension
            may be 1: state for scalar decay, length for a fixed A. Linear attention: zeros of shape (1, 1, 1, 1).
        b: (batch, heads, length, state), how an input enters the state. batch and heads may be 1.
        c: (batch, heads, length, state), how an output reads it. batch and heads may be 1.

    Raises:
        OperatorError: The shapes do not fit together.

    Example:
        >>> memory = DiagonalRecurrence(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 6, 2), torch.ones(1, 1, 6, 2))
        >>> memory.singular_values([3]).round(decimals=4)  # two state dimensions that hold the same thing: rank 1
        tensor([[[[6., 0.]]]])
    """

    log_decay: Tensor
    b: Tensor
    c: Tensor

    def __post_init__(self) -> None:
        shape = "(batch, heads, length, state)"
        for name, tensor in (("log_decay", self.log_decay), ("b", self.b), ("c", self.c)):
            check_floating(name, tensor, shape, 4)
        check_same_device(log_decay=self.log_decay, b=self.b, c=self.c)
        if self.b.shape[2:] != self.c.shape[2:]:
            raise OperatorError(
                f"b has shape {tuple(self.b.shape)} and c {tuple(self.c.shape)}; both must be {shape} with the same "
                "length and state."
            )
        for dimension, size in zip((2, 3), self.b.shape[2:], strict=True):
            if self.log_decay.shape[dimension] not in (1, size):
                raise OperatorError(
                    f"log_decay has shape {tuple(self.log_decay.shape)}, which does not broadcast to b's "
                    f"{tuple(self.b.shape)}: dimension {dimension} must be 1 or {size}."
                )
        for name, dimension in (("samples", 0), ("heads", 1)):
            sizes = {field: getattr(self, field).shape[dimension] for field in ("log_decay", "b", "c")}
            common_size(name, **sizes)

    @property
    def batch(self) -> int:
        return max(tensor.shape[0] for tensor in self.tensors)

    @property
    def heads(self) -> int:
        return max(tensor.shape[1] for tensor in self.tensors)

    @property
    def length(self) -> int:
        return self.b.shape[2]

    @property
    def state_size(self) -> int:
        """State dimensions per channel, n."""
        return self.b.shape[3]

    @property
    def capacity_grows(self) -> bool:
        return False

    def state_capacity(self, positions: Sequence[int]) -> Tensor:
        return torch.full((len(self._checked(positions)),), float(self.state_size), device=self.device)

    def finite(self) -> Tensor:
        # A log decay of -inf is a decay of 0 and legal.
        decays = ~(self.log_decay.isnan() | self.log_decay.isposinf()).flatten(2).any(-1)
        return (decays & all_finite(self.b) & all_finite(self.c)).expand(self.batch, self.heads)

    def without_decay(self) -> DiagonalRecurrence:
        return DiagonalRecurrence(resets(self.log_decay), self.b, self.c)

    @torch.no_grad()
    def materialize(self) -> Tensor:
        size = (self.batch, self.heads, self.length)
        dtype = working_dtype(self.device)
        decay = self.log_decay.to(dtype).exp().expand(-1, -1, self.length, -1)
        state = torch.zeros((*size, self.state_size), dtype=dtype, device=self.device)
        operator = torch.zeros((*size, self.length), dtype=dtype, device=self.device)
        for i in range(self.length):
            state[:, :, :i] *= decay[:, :, i, None]
            state[:, :, i] = self.b[:, :, i]
            operator[:, :, i, : i + 1] = (state[:, :, : i + 1] * self.c[:, :, i, None].to(dtype)).sum(-1)
        return operator.to(result_dtype(*(tensor.dtype for tensor in self.tensors)))

    def _raw_singular_values(self, positions: Sequence[int]) -> Tensor:
        return recurrence_singular_values(self.log_decay, self.b, self.c, positions, self.batch, self.heads)

    def _narrow(self, samples: Sequence[int] | None, heads: Sequence[int] | None, length: int | None) -> Self:
        return self.map(lambda tensor: first(take(take(tensor, 0, samples), 1, heads), 2, length))


@dataclass(frozen=True, eq=False)
class ReadFirstRecurrence(DiagonalRecurrence):
    """y_t = c_t . s_{t-1}, then s_t = diag(exp log_decay_t) s_{t-1} + b_t u_t: the state is read before it is updated.

    T_ij = sum_n c_i[n] exp(log_decay_{j+1}[n] + ... + log_decay_{i-1}[n]) b_j[n] for i > j, and 0 for i = j: what a
    token adds to its own output is in no H_i. A log decay of -inf separates sequences: the read of that token sees
    nothing from before it either.

    Arguments as in `DiagonalRecurrence`, and so are A, the state without decay and the cost.
    """

    def _updated_first(self) -> DiagonalRecurrence:
        """The same H_i with the read after the update: the one decay that such a read sees more is divided out.

        Decays too strong for that are bounded. What they then leave of a state, exp(-283) in float64, is as far below
        the rounding of any sum as nothing at all is.
        """
        dtype = working_dtype(self.device)
        bound = 0.4 * math.log(torch.finfo(dtype).tiny)
        separates = self.log_decay.isneginf()
        log_decay = self.log_decay.to(dtype).masked_fill(separates, 0.0).clamp_min(bound)
        c = self.c.to(dtype) * (-log_decay).exp()
        return DiagonalRecurrence(log_decay.masked_fill(separates, -math.inf), self.b, c)

    @torch.no_grad()
    def materialize(self) -> Tensor:
        return self._updated_first().materialize().tril(-1).to(result_dtype(*(t.dtype for t in self.tensors)))

    def _raw_singular_values(self, positions: Sequence[int]) -> Tensor:
        return self._updated_first()._raw_singular_values(positions)
