"""Singular values of a diagonal recurrence without forming its operator.

H_i = O_i C_i passes through the state (appendix B.2.2 of the paper), so its rank is at most the state size N:

    C_i columns j <  i:   exp(ld_{j+1} + ... + ld_{i-1}) b_j          what input j left in the state before step i
    O_i rows    r >= i:   exp(ld_i + ... + ld_r) c_r                  what output r reads from that state

With C_i^T = Q R_C and O_i = Q' R_O the singular values of H_i are those of R_O R_C^T, an N x N matrix. A triangular
factor is carried through the sequence: R' = qr([R diag(decay over a chunk); rows of the chunk]), the square-root form
of the Gramian recursion: it never squares the condition number. Cost O(L N^2 + P N^3) for P positions.

The observation side is the control side with time reversed, except that a row also carries its own decay
(`own_decay`). All decays are summed directly, never as differences of running sums: those lose digits, and give NaN
for a decay of exactly 0.

Shapes: B batch, H heads, L length, N state, P positions, K rows per chunk, W windows. Dimensions of size 1 of the
inputs stay broadcast for as long as possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ess_monitor.ess.linalg import index_tensor, singular_values_, slabs, triangular_factor_, working_dtype


def recurrence_singular_values(
    log_decay: Tensor, b: Tensor, c: Tensor, positions: Sequence[int], batch: int, heads: int
) -> Tensor:
    """Singular values of every H_i: (B, H, P, min(N, largest min(i, L - i))), in the working dtype.

    `log_decay` is (B|1, H|1, L|1, N|1); `b` and `c` are (B|1, H|1, L, N). A head with NaN or Inf in it gives NaN.
    """
    length, state = b.shape[2:]
    log_decay = log_decay.expand(-1, -1, length, -1)
    chunk = chunk_length(length, state, len(positions))
    control = _Side(b.flip(2), log_decay.flip(2), False, batch, heads, chunk)
    observation = _Side(c, log_decay, True, batch, heads, chunk)
    reverse_positions = [length - i for i in positions]
    control_starts = _chunk_factors(control, positions)
    observation_starts = _chunk_factors(observation, reverse_positions)
    rank = min(state, max(min(i, length - i) for i in positions))
    out = b.new_empty((batch, heads, len(positions), rank), dtype=working_dtype(b.device))
    for slab in slabs(len(positions), batch * heads * (chunk + state) * state):
        r_c = _factors_at(control, control_starts, positions[slab])
        r_o = _factors_at(observation, observation_starts, reverse_positions[slab])
        out[:, :, slab] = singular_values_(r_o @ r_c.mT)[..., :rank]
    return out


def chunk_length(length: int, state: int, positions: int) -> int:
    """Rows per chunk: long chunks for few positions (fewer sequential steps), short ones for many (less padding)."""
    shortest, longest = max(8, state // 2), max(128, 2 * state)
    return max(1, min(length, longest, max(shortest, length // (positions + 1))))


@dataclass(frozen=True, eq=False)
class _Side:
    """One of the two factors: rows that enter a state one after another, and the decay between them.

    `rows` (B|1, H|1, L, N) and `log_decay` (B|1, H|1, L, N|1) are stored newest first, so that the decay which a row
    has seen is a plain running sum; the order of rows does not matter to R. Ends and chunks count from the oldest.
    """

    rows: Tensor
    log_decay: Tensor
    own_decay: bool
    batch: int
    heads: int
    chunk: int

    @property
    def length(self) -> int:
        return self.rows.shape[2]

    @property
    def state(self) -> int:
        return self.rows.shape[3]

    def stacked(self, before: Tensor | None, rows: Tensor, log_decay: Tensor) -> Tensor:
        """Rows of windows as seen from each window's end, below the factor of everything before the window.

        `rows` (B|1, H|1, W, K, N), `log_decay` (B|1, H|1, W, K, N|1) and `before` (B, H, W, N, N) give
        (B, H, W, N + K, N); without `before` (B, H, W, K, N).
        """
        seen = log_decay.cumsum(3)
        head = 0 if before is None else self.state
        out = rows.new_empty((self.batch, self.heads, rows.shape[2], head + rows.shape[3], self.state))
        if before is not None:
            torch.mul(before, seen[..., -1:, :].exp(), out=out[..., :head, :])
        if not self.own_decay:
            seen = torch.cat([torch.zeros_like(seen[..., :1, :]), seen[..., :-1, :]], dim=3)
        torch.mul(rows.expand(self.batch, self.heads, -1, -1, -1), seen.exp_(), out=out[..., head:, :])
        return out


@dataclass(frozen=True, eq=False)
class _ChunkFactors:
    """R at the start of some chunks: `factors[:, :, slots[k]]` (B, H, ., N, N) belongs to chunk k."""

    factors: Tensor
    slots: dict[int, int]


def _chunk_factors(side: _Side, ends: Sequence[int]) -> _ChunkFactors:
    """R over all rows before the chunk that each of `ends` lies in."""
    chunk, state = side.chunk, side.state
    dtype = working_dtype(side.rows.device)
    slots = {k: slot for slot, k in enumerate(sorted({end // chunk for end in ends}))}
    factors = side.rows.new_zeros((side.batch, side.heads, len(slots), state, state), dtype=dtype)
    factor = torch.zeros_like(factors[:, :, 0])
    for slab in slabs(max(slots), side.batch * side.heads * chunk * state):
        window = slice(side.length - slab.stop * chunk, side.length - slab.start * chunk)
        rows = _windows(side.rows[:, :, window], chunk).to(dtype)
        log_decay = _windows(side.log_decay[:, :, window], chunk).to(dtype)
        local = side.stacked(None, rows, log_decay)
        if chunk > state:  # all chunks at once: only the small combination below is sequential
            local = triangular_factor_(local)
        decay = log_decay.sum(3, keepdim=True).exp()
        for k in range(slab.start, slab.stop):
            if k in slots:
                factors[:, :, slots[k]] = factor
            newest_first = slab.stop - 1 - k
            carried = factor * decay[:, :, newest_first]
            factor = triangular_factor_(torch.cat([carried, local[:, :, newest_first]], dim=-2))
    factors[:, :, slots[max(slots)]] = factor
    return _ChunkFactors(factors, slots)


def _factors_at(side: _Side, starts: _ChunkFactors, ends: Sequence[int]) -> Tensor:
    """R over the rows before each of `ends`, from the factor at the start of its chunk: (B, H, P, N, N)."""
    device, chunk = side.rows.device, side.chunk
    dtype = working_dtype(device)
    before = starts.factors.index_select(2, index_tensor([starts.slots[end // chunk] for end in ends], device))
    longest = max(end % chunk for end in ends)
    if longest == 0:
        return before
    newest = index_tensor([side.length - end for end in ends], device)[:, None]
    offset = torch.arange(longest, device=device)
    inside = (offset < index_tensor([end % chunk for end in ends], device)[:, None])[..., None]
    token = (newest + offset).clamp(max=side.length - 1)
    # Rows before the chunk count as absent, and so does their decay: zero rows, and a log decay of 0.
    rows = side.rows[:, :, token].to(dtype).masked_fill_(~inside, 0.0)
    log_decay = side.log_decay[:, :, token].to(dtype).masked_fill_(~inside, 0.0)
    return triangular_factor_(side.stacked(before, rows, log_decay))


def _windows(tensor: Tensor, chunk: int) -> Tensor:
    """(., ., W K, N) -> (., ., W, K, N), as a view."""
    samples, heads, _, state = tensor.shape
    return tensor.reshape(samples, heads, -1, chunk, state)
