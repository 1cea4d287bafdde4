"""Defines the recurrence that an operator comes from, with matrices and vectors for every token.

    s_{t+1} = A_t s_t + b_t u_t,    y_t = c_t . s_t + d_t u_t    (Eq. 1 of the paper: the state is read, then updated)

so T_tj = c_t A_{t-1} ... A_{j+1} b_j for t > j and d_t for t = j, and H_i = O_i C_i (B.2.2). A layer that updates its
state before it reads it has c_t^T A_t here where it has c_t^T itself.

Shapes: B batch, H heads, L length, N state, K tokens of a slice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Matrices = Callable[[slice], Tensor]
"""Tokens -> A of each of them, (B|1, H|1, K, N, N)."""


@dataclass(frozen=True, eq=False)
class StateSpace:
    """Holds a recurrence in the working dtype. A is formed for some tokens at a time."""

    A: Matrices
    b: Tensor
    """(B|1, H|1, L, N)."""
    c: Tensor
    """(B|1, H|1, L, N)."""
    d: Tensor
    """(B|1, H|1, L)."""

    @property
    def length(self) -> int:
        return self.b.shape[2]

    @property
    def state(self) -> int:
        return self.b.shape[3]

    def in_segments(self, segments: Tensor) -> StateSpace:
        """Return the recurrence that empties its state after each segment and leaves padding out."""
        real = segments >= 0
        goes_on = torch.nn.functional.pad(segments[..., 1:] == segments[..., :-1], (0, 1), value=False) & real

        def matrices(tokens: slice) -> Tensor:
            return torch.where(goes_on[:, :, tokens, None, None], self.A(tokens), 0.0)

        b = torch.where(goes_on[..., None], self.b, 0.0)
        return replace(self, A=matrices, b=b, d=torch.where(real, self.d, 0.0))


def diagonal(decay: Tensor) -> Matrices:
    """Return A = diag(decay), from decays (B|1, H|1, L, N)."""
    return lambda tokens: torch.diag_embed(decay[:, :, tokens])


def diagonal_plus_rank_one(decay: Tensor, left: Tensor, right: Tensor) -> Matrices:
    """Return A = diag(decay) + left right^T, from vectors (B|1, H|1, L, N)."""

    def matrices(tokens: slice) -> Tensor:
        rank_one = left[:, :, tokens, :, None] * right[:, :, tokens, None, :]
        return torch.diag_embed(decay[:, :, tokens]) + rank_one

    return matrices


def last_inputs(length: int, taps: Tensor, b: Tensor, c: Tensor) -> StateSpace:
    """Return the recurrence of a filter between two gates: its state holds the last inputs, latest first.

    Args:
        length: L.
        taps: (B|1, H|1, K), of which the first is for the input of the token itself; at least one.
        b: (B|1, H|1, L|1), gate on the input.
        c: (B|1, H|1, L|1), gate on the output.
    """
    state = max(1, taps.shape[2] - 1)
    later = torch.nn.functional.pad(taps[:, :, 1:], (0, state - (taps.shape[2] - 1)))
    shift = torch.diag(taps.new_ones(state - 1), -1)
    latest = torch.eye(1, state, dtype=taps.dtype, device=taps.device)
    if taps.shape[2] == 1:  # nothing is held
        latest = torch.zeros_like(latest)

    def matrices(tokens: slice) -> Tensor:
        return shift.expand(1, 1, tokens.stop - tokens.start, state, state)

    gates = (b * c).expand(-1, -1, length)
    return StateSpace(
        matrices,
        (b[..., None] * latest).expand(-1, -1, length, -1),
        (c[..., None] * later[:, :, None]).expand(-1, -1, length, -1),
        gates * taps[:, :, :1],
    )
