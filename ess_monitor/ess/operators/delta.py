"""Recurrences that erase what they overwrite: DeltaNet, Gated DeltaNet, KDA, RWKV-7 and their like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ess_monitor.errors import OperatorError
from ess_monitor.ess.delta_gramian import Transitions, delta_singular_values
from ess_monitor.ess.linalg import result_dtype
from ess_monitor.ess.operators.base import Operator
from ess_monitor.ess.operators.fields import all_finite, check_floating, check_same_device, common_size, first, take
from ess_monitor.ess.operators.recurrence import DiagonalRecurrence, resets

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class DeltaRecurrence(Operator):
    """s_t = A_t s_{t-1} + beta_t k_t u_t,  y_t = q_t . s_t, with transitions that are diagonal plus rank one.

    The gated delta rule, A_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t)), replaces what the state holds at the key
    k_t by the input: DeltaNet with log_decay = 0, Gated DeltaNet with one decay per head, KDA with one per state
    dimension. beta in 0..1 with keys of norm 1; up to 2 where negative eigenvalues are allowed.

    With `left` and `right`, A_t = diag(exp(log_decay_t)) + left_t right_t^T; see `diagonal_plus_rank_one`.

    T_ij = q_i^T A_i ... A_{j+1} k_j beta_j for i >= j. TSS is the state size n. Singular values cost
    O(L n^2 + P n^3) for P positions; neither T nor any A_t is formed (`ess_monitor.ess.delta_gramian`).

    Args:
        log_decay: (batch, heads, length, state); -inf is a decay of exactly 0. Any dimension may be 1: state for scalar
            decay, length for a fixed one. No decay: zeros of shape (1, 1, 1, 1).
        beta: (batch, heads, length), how much of the old value is replaced, after any sigmoid. Any dimension may be 1.
        k: (batch, heads, length, state), keys as the recurrence uses them, so normalized first where the layer does.
            batch and heads may be 1.
        q: (batch, heads, length, state), how an output reads the state. batch and heads may be 1.
        left: (batch, heads, length, state), what the rank-one part writes. batch and heads may be 1.
        right: (batch, heads, length, state), what it reads of the state before the decay. batch and heads may be 1.

    Raises:
        OperatorError: The shapes do not fit together, or only one of `left` and `right` is there.

    Example:
        >>> one, key = torch.ones(1, 1, 6), torch.tensor([1.0, 0.0]).expand(1, 1, 6, 2)
        >>> overwriting = DeltaRecurrence(torch.zeros(1, 1, 1, 1), one, key, key)
        >>> overwriting.singular_values([3]).round(decimals=4)  # the same key again: every token erases the one before
        tensor([[[[0., 0.]]]])
    """

    log_decay: Tensor
    beta: Tensor
    k: Tensor
    q: Tensor
    left: Tensor | None = field(default=None, kw_only=True)
    right: Tensor | None = field(default=None, kw_only=True)

    @classmethod
    def diagonal_plus_rank_one(
        cls, log_decay: Tensor, left: Tensor, right: Tensor, b: Tensor, c: Tensor
    ) -> DeltaRecurrence:
        """s_t = (diag(exp(log_decay_t)) + left_t right_t^T) s_{t-1} + b_t u_t,  y_t = c_t . s_t.

        `right` reads the state before the decay. RWKV-7, S_t = diag(e^w) S + b (a^T S) + k v^T read with r, is
        `diagonal_plus_rank_one(w, b, a, k, r)`. Shapes as in the class, all vectors (batch, heads, length, state).

        Example:
            >>> ones = torch.ones(1, 1, 4, 2)
            >>> held = DeltaRecurrence.diagonal_plus_rank_one(torch.zeros(1, 1, 1, 1), 0 * ones, ones, ones, ones)
            >>> held.singular_values([2]).round(decimals=4)
            tensor([[[[4., 0.]]]])
        """
        check_floating("b", b, "(batch, heads, length, state)", 4)
        return cls(log_decay, b.new_ones((1, 1, 1)), b, c, left=left, right=right)

    def __post_init__(self) -> None:
        shape = "(batch, heads, length, state)"
        if (self.left is None) != (self.right is None):
            raise OperatorError("left and right make the rank-one part together: pass both or neither.")
        vectors = {"k": self.k, "q": self.q}
        if self.left is not None and self.right is not None:
            vectors |= {"left": self.left, "right": self.right}
        for name, tensor in {"log_decay": self.log_decay, **vectors}.items():
            check_floating(name, tensor, shape, 4)
        check_floating("beta", self.beta, "(batch, heads, length)", 3)
        everything = {"log_decay": self.log_decay, "beta": self.beta, **vectors}
        check_same_device(**everything)
        for name, tensor in vectors.items():
            if tensor.shape[2:] != self.k.shape[2:]:
                raise OperatorError(
                    f"{name} has shape {tuple(tensor.shape)} and k {tuple(self.k.shape)}; both must be {shape} with "
                    "the same length and state."
                )
        for name in ("log_decay", "beta"):
            for dimension, size in enumerate(everything[name].shape[2:], start=2):
                if size not in (1, self.k.shape[dimension]):
                    raise OperatorError(
                        f"{name} has shape {tuple(everything[name].shape)}, which does not broadcast to k's "
                        f"{tuple(self.k.shape)}: dimension {dimension} must be 1 or {self.k.shape[dimension]}."
                    )
        for name, dimension in (("samples", 0), ("heads", 1)):
            common_size(name, **{key: tensor.shape[dimension] for key, tensor in everything.items()})

    @property
    def batch(self) -> int:
        return max(tensor.shape[0] for tensor in self.tensors)

    @property
    def heads(self) -> int:
        return max(tensor.shape[1] for tensor in self.tensors)

    @property
    def length(self) -> int:
        return self.k.shape[2]

    @property
    def state_size(self) -> int:
        """State dimensions per channel, n."""
        return self.k.shape[3]

    @property
    def capacity_grows(self) -> bool:
        return False

    @property
    def transitions(self) -> Transitions:
        """What A and the inputs are made of, for those who multiply by A."""
        return Transitions(self.log_decay, self.beta[..., None], self.k, self.left, self.right)

    def state_capacity(self, positions: Sequence[int]) -> Tensor:
        return torch.full((len(self._checked(positions)),), float(self.state_size), device=self.device)

    def finite(self) -> Tensor:
        # A log decay of -inf is a decay of 0 and legal.
        finite = ~(self.log_decay.isnan() | self.log_decay.isposinf()).flatten(2).any(-1)
        for tensor in self.tensors[1:]:
            finite = finite & all_finite(tensor)
        return finite.expand(self.batch, self.heads)

    def without_decay(self) -> DiagonalRecurrence:
        """The same inputs and reads with A := I: nothing decays, and nothing is erased either."""
        dtype = result_dtype(self.beta.dtype, self.k.dtype)
        return DiagonalRecurrence(resets(self.log_decay), self.beta[..., None].to(dtype) * self.k.to(dtype), self.q)

    @torch.no_grad()
    def materialize(self) -> Tensor:
        size = (self.batch, self.heads, self.length)
        steps = self.transitions.steps(lambda tensor: tensor)
        decay = steps.decay.expand(-1, -1, self.length, -1)
        state = torch.zeros((*size, self.state_size), dtype=decay.dtype, device=self.device)
        operator = torch.zeros((*size, self.length), dtype=decay.dtype, device=self.device)
        for i in range(self.length):
            read = (state * steps.right[:, :, i, None]).sum(-1, keepdim=True)
            state = state * decay[:, :, i, None] + read * steps.left[:, :, i, None]
            state[:, :, i] = steps.entering[:, :, i]
            operator[:, :, i] = (state * self.q[:, :, i, None].to(decay.dtype)).sum(-1)
        return operator.to(result_dtype(*(tensor.dtype for tensor in self.tensors)))

    def _raw_singular_values(self, positions: Sequence[int]) -> Tensor:
        return delta_singular_values(self.transitions, self.q, positions, self.batch, self.heads)

    def _narrow(self, samples: Sequence[int] | None, heads: Sequence[int] | None, length: int | None) -> Self:
        return self.map(lambda tensor: first(take(take(tensor, 0, samples), 1, heads), 2, length))
