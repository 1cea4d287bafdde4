"""Defines recurrences that erase what they overwrite: DeltaNet, Gated DeltaNet, KDA, RWKV-7."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ess_monitor.errors import OperatorError
from ess_monitor.ess.delta_gramian import (
    Transitions,
    delta_cores,
    delta_row_squares,
    delta_singular_values,
    delta_windows,
    mean_diagonal,
    transition_product_norm,
)
from ess_monitor.ess.linalg import result_dtype
from ess_monitor.ess.operators.fields import check_floating
from ess_monitor.ess.operators.recurrence import VECTOR_SHAPE, DiagonalRecurrence, Recurrence, resets
from ess_monitor.ess.realization.state_space import StateSpace, diagonal_plus_rank_one
from ess_monitor.ess.row_squares import Windows, row_squares


@dataclass(frozen=True, eq=False)
class DeltaRecurrence(Recurrence):
    """Computes s_t = A_t s_{t-1} + beta_t k_t u_t,  y_t = q_t . s_t, with A_t diagonal plus rank one.

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
        OperatorError: The shapes do not fit together, or only one of `left` and `right` is given.

    Examples:
        >>> one, key = torch.ones(1, 1, 6), torch.tensor([1.0, 0.0]).expand(1, 1, 6, 2)
        >>> overwriting = DeltaRecurrence(torch.zeros(1, 1, 1, 1), one, key, key)
        >>> overwriting.singular_values([3]).round(decimals=4)  # the same key again: every token erases the one before
        tensor([[[[0., 0.]]]])
    """

    beta: Tensor
    k: Tensor
    q: Tensor
    left: Tensor | None = field(default=None, kw_only=True)
    right: Tensor | None = field(default=None, kw_only=True)

    @classmethod
    def diagonal_plus_rank_one(
        cls, log_decay: Tensor, left: Tensor, right: Tensor, b: Tensor, c: Tensor
    ) -> DeltaRecurrence:
        """Return s_t = (diag(exp(log_decay_t)) + left_t right_t^T) s_{t-1} + b_t u_t,  y_t = c_t . s_t.

        `right` reads the state before the decay. RWKV-7, S_t = diag(e^w) S + b (a^T S) + k v^T read with r, is
        `diagonal_plus_rank_one(w, b, a, k, r)`. Shapes as in the class, all vectors (batch, heads, length, state).

        Examples:
            >>> ones = torch.ones(1, 1, 4, 2)
            >>> held = DeltaRecurrence.diagonal_plus_rank_one(torch.zeros(1, 1, 1, 1), 0 * ones, ones, ones, ones)
            >>> held.singular_values([2]).round(decimals=4)
            tensor([[[[4., 0.]]]])
        """
        check_floating("b", b, VECTOR_SHAPE, 4)
        return cls(log_decay, b.new_ones((1, 1, 1)), b, c, left=left, right=right)

    def __post_init__(self) -> None:
        if (self.left is None) != (self.right is None):
            raise OperatorError("left and right make the rank-one part together: pass both or neither.")
        check_floating("beta", self.beta, "(batch, heads, length)", 3)
        super().__post_init__()

    @property
    def _vectors(self) -> dict[str, Tensor]:
        vectors = {"k": self.k, "q": self.q}
        if self.left is not None and self.right is not None:
            vectors |= {"left": self.left, "right": self.right}
        return vectors

    @property
    def transitions(self) -> Transitions:
        """The tensors that make A and the inputs."""
        return Transitions(self.log_decay, self.beta[..., None], self.k, self.left, self.right)

    def without_decay(self) -> DiagonalRecurrence:
        """Return the operator with A := I: nothing decays, and nothing is erased either."""
        dtype = result_dtype(self.beta.dtype, self.k.dtype)
        b = self.beta[..., None].to(dtype) * self.k.to(dtype)
        return DiagonalRecurrence(resets(self.log_decay), b, self.q, segments=self.segments)

    @torch.no_grad()
    def _materialize(self) -> Tensor:
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
        return operator.to(self.result_dtype)

    def _product_norm(self) -> Tensor:
        dtype = torch.finfo(self.result_dtype)
        smallest = dtype.smallest_normal * dtype.eps
        return transition_product_norm(self.transitions, self.batch, self.heads, smallest)

    def _mean_diagonal(self) -> Tensor:
        return mean_diagonal(self.transitions)

    def _row_squares(self, position: int, start: int) -> tuple[Tensor, Tensor]:
        return delta_row_squares(self.transitions, self.q, self.batch, self.heads, position, start)

    def _unit_rows(self) -> DeltaRecurrence:
        return replace(self, q=self.q * self._inverse(row_squares(self._windows))[..., None])

    @property
    def _windows(self) -> Windows:
        return delta_windows(self.transitions, self.q, self.batch, self.heads)

    def _state_space(self) -> StateSpace:
        steps = self.transitions.steps(lambda tensor: tensor)
        decay = steps.decay.expand(-1, -1, self.length, self.state_size)
        q = self.q.to(decay.dtype)
        read = q * decay + (q * steps.left).sum(-1, keepdim=True) * steps.right  # q^T A
        return StateSpace(
            diagonal_plus_rank_one(decay, steps.left, steps.right), steps.entering, read, (q * steps.entering).sum(-1)
        )

    def _raw_singular_values(self, positions: Sequence[int], tolerance: float | None = None) -> Tensor:
        return delta_singular_values(self.transitions, self.q, positions, self.batch, self.heads)

    def _cores(self, positions: Sequence[int]) -> Tensor:
        return delta_cores(self.transitions, self.q, positions, self.batch, self.heads)
