"""Computes singular values of a recurrence without forming its operator.

H_i = O_i C_i passes through the state (appendix B.2.2 of the paper), so its rank is at most the state size N:

    C_i columns j <  i:   A_{i-1} ... A_{j+1} b_j          what input j left in the state before step i
    O_i rows    r >= i:   c_r A_r ... A_i                  what output r reads from that state

With C_i^T = Q R_C and O_i = Q' R_O the singular values of H_i are those of R_O R_C^T, an N x N matrix. A triangular
factor is carried through the sequence: R' = qr([R A^T over a chunk; rows of the chunk]), the square-root form of the
Gramian recursion: it never squares the condition number. Cost O(L N^2 + P N^3) for P positions.

The rows of O are those of C^T with time reversed and A transposed, except that a row also passes its own transition
(`passes_own_transition`). `FactorRows` yields either; its subclasses define the transition: diagonal here, diagonal
plus rank one in `ess_monitor.ess.delta_gramian`. All log decays are summed directly, never as differences of running
sums: those lose digits, and give NaN for a decay of exactly 0.

Shapes: B batch, H heads, L length, N state, P positions, K rows per chunk, W windows. Dimensions of size 1 of the
inputs stay broadcast for as long as possible.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ess_monitor.ess.linalg import (
    index_tensor,
    singular_values_,
    slabs,
    triangular_factor,
    working_dtype,
)
from ess_monitor.ess.positions import tokens_in_reach

Pick = Callable[[Tensor], Tensor]
"""Cuts windows out of a sequence: (B|1, H|1, L, N) -> (B|1, H|1, W, K, N)."""

Carry = Callable[[Tensor, int], Tensor]
"""A factor (B, H, N, N) from the start to the end of one of the windows."""


@dataclass(frozen=True, eq=False)
class FactorRows(ABC):
    """Yields the rows of one of the two factors: they enter a state one after another, with transitions in between.

    All that is indexed by time is stored newest first, so that what a diagonal has done to a row is a plain running
    sum; the order of rows does not matter to R. Ends and chunks count from the oldest.
    """

    rows: Tensor
    """(B|1, H|1, L, N)."""
    passes_own_transition: bool
    batch: int
    heads: int
    chunk: int

    @property
    def length(self) -> int:
        return self.rows.shape[2]

    @property
    def state(self) -> int:
        return self.rows.shape[3]

    @property
    @abstractmethod
    def window_elements(self) -> int:
        """Elements held at once for one window of `chunk` rows."""

    @abstractmethod
    def chunks(self, pick: Pick) -> tuple[Tensor, Carry]:
        """Return rows of windows as seen from each window's end, (B, H, W, K, N), and the carry through the windows."""

    @abstractmethod
    def followed(self, before: Tensor | None, pick: Pick, inside: Tensor) -> Tensor:
        """Carry `before` (B, H, W, N, N) through windows and append the rows of these: (B, H, W, N + K, N).

        With None before, only these rows. Where `inside` (W, K, 1) is False there is no token: no row, and a transition
        that changes nothing.
        """


@dataclass(frozen=True, eq=False)
class Diagonal:
    """Holds a diagonal recurrence: log decays (B|1, H|1, L|1, N|1), and b and c, (B|1, H|1, L, N)."""

    log_decay: Tensor
    b: Tensor
    c: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """B and H."""
        fields = (self.log_decay, self.b, self.c)
        return max(field.shape[0] for field in fields), max(field.shape[1] for field in fields)

    def of(self, chosen: Tensor | None) -> Diagonal:
        """Return the recurrence of some samples and heads, (B, H) bool, in this order. None: all of it.

        They are heads of one sample, unless they are the same heads of every sample.
        """
        if chosen is None or bool(chosen.all()):
            return self
        fields = (self.log_decay, self.b, self.c)
        if bool((chosen == chosen[:1]).all()):  # what the heads share stays shared
            heads = chosen[0].nonzero()[:, 0]
            return Diagonal(*(field if field.shape[1] == 1 else field[:, heads] for field in fields))
        return Diagonal(*(field.expand(*self.shape, -1, -1)[chosen][None] for field in fields))

    def sides(self, positions: int) -> tuple[FactorRows, FactorRows]:
        """Return the factors C^T and O, cut for so many positions."""
        length, state = self.b.shape[2:]
        chunk, log_decay = chunk_length(length, state, positions), self.log_decay.expand(-1, -1, length, -1)
        control = _DiagonalRows(self.b.flip(2), False, *self.shape, chunk, log_decay.flip(2))
        return control, _DiagonalRows(self.c, True, *self.shape, chunk, log_decay)


def recurrence_singular_values(recurrence: Diagonal, positions: Sequence[int]) -> Tensor:
    """Return the singular values of every H_i of a diagonal recurrence: (B, H, P, min(N, largest min(i, L - i))).

    In the working dtype. A head with NaN or Inf in it gives NaN.
    """
    b, c, (length, state) = recurrence.b, recurrence.c, recurrence.b.shape[2:]
    log_decay = recurrence.log_decay.expand(-1, -1, length, -1)
    at = index_tensor(positions, b.device)
    first_read = _norms(c[:, :, at] * log_decay[:, :, at].to(working_dtype(c.device)).exp())
    reach = tokens_in_reach(log_decay.amax(-1), _norms(b), _norms(c), first_read, positions, state)
    reach = reach.expand(recurrence.shape)
    return by_reach(reach, lambda chosen: recurrence.of(chosen).sides(len(positions)), positions)


def _norms(vectors: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1, dtype=working_dtype(vectors.device))
    return norms


def recurrence_cores(recurrence: Diagonal, positions: Sequence[int]) -> Tensor:
    """Return matrices with the singular values of every H_i of a diagonal recurrence: (B, H, P, N, N)."""
    return two_sided_cores(*recurrence.sides(len(positions)), positions)


def by_reach(
    reach: Tensor, sides: Callable[[Tensor | None], tuple[FactorRows, FactorRows]], positions: Sequence[int]
) -> Tensor:
    """Return the singular values of the product of both factors at every position: (B, H, P, rank).

    `reach` is that of `tokens_in_reach`, (B, H). `sides` returns the factors of some samples and heads, (B, H) bool, as
    heads of one sample, or of all of them.
    """
    if reach.device.type != "cpu":
        return two_sided_singular_values(*sides(None), positions)
    parts = []
    for size in sorted(set(reach.flatten().tolist())):
        factors = sides(reach == size)
        values = (
            near_singular_values(*factors, positions, size) if size else two_sided_singular_values(*factors, positions)
        )
        parts.append((reach == size, values))
    length, state = factors[0].length, factors[0].state
    rank = min(state, max(min(i, length - i) for i in positions))
    out = values.new_zeros((*reach.shape, len(positions), rank))
    for chosen, values in parts:
        kept = values[..., :rank].reshape(-1, len(positions), min(rank, values.shape[-1]))
        out[chosen] = F.pad(kept, (0, rank - kept.shape[-1]))
    return out


def near_singular_values(control: FactorRows, observation: FactorRows, positions: Sequence[int], size: int) -> Tensor:
    """Return the singular values of the block of H_i of `size` tokens on either side: (B, H, P, size)."""
    length = control.length
    parts = []
    for slab in slabs(len(positions), control.window_elements * -(-size // control.chunk)):
        at, device = positions[slab], control.rows.device
        reverse = [length - i for i in at]
        columns = control.followed(None, *windows_before(length, at, [min(size, i) for i in at], device))
        rows = observation.followed(None, *windows_before(length, reverse, [min(size, i) for i in reverse], device))
        values = singular_values_(rows @ columns.mT)
        parts.append(F.pad(values, (0, size - values.shape[-1])))
    return torch.cat(parts, dim=2)


def two_sided_singular_values(control: FactorRows, observation: FactorRows, positions: Sequence[int]) -> Tensor:
    """Return the singular values of the product of both factors at every position: (B, H, P, rank)."""
    length, state = control.length, control.state
    rank = min(state, max(min(i, length - i) for i in positions))
    shape = (control.batch, control.heads, len(positions), rank)
    out = control.rows.new_empty(shape, dtype=working_dtype(control.rows.device))
    for slab, core in _cores(control, observation, positions):
        out[:, :, slab] = singular_values_(core)[..., :rank]
    return out


def two_sided_cores(control: FactorRows, observation: FactorRows, positions: Sequence[int]) -> Tensor:
    """Return the product of both factors at every position: (B, H, P, N, N)."""
    return torch.cat([core for _, core in _cores(control, observation, positions)], dim=2)


def _cores(control: FactorRows, observation: FactorRows, positions: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """Yield which positions these are, and R_O R_C^T there."""
    batch, heads, length, state = control.batch, control.heads, control.length, control.state
    reverse_positions = [length - i for i in positions]
    control_starts = _chunk_factors(control, positions)
    observation_starts = _chunk_factors(observation, reverse_positions)
    for slab in slabs(len(positions), control.window_elements + batch * heads * state * state):
        r_c = _factors_at(control, control_starts, positions[slab])
        r_o = _factors_at(observation, observation_starts, reverse_positions[slab])
        yield slab, r_o @ r_c.mT


def chunk_length(length: int, state: int, positions: int) -> int:
    """Return rows per chunk: many for few positions (fewer sequential steps), few for many (less padding)."""
    shortest, longest = max(8, state // 2), max(256, 2 * state, length // 128)
    return max(1, min(length, longest, max(shortest, length // (positions + 1))))


@dataclass(frozen=True, eq=False)
class _DiagonalRows(FactorRows):
    """Passes rows through diag(exp(log_decay_t)); `log_decay` is (B|1, H|1, L, N|1), newest first."""

    log_decay: Tensor

    @property
    def window_elements(self) -> int:
        return self.batch * self.heads * self.chunk * self.state

    def chunks(self, pick: Pick) -> tuple[Tensor, Carry]:
        dtype = working_dtype(self.rows.device)
        log_decay = pick(self.log_decay).to(dtype)
        local = self._stacked(None, pick(self.rows).to(dtype), log_decay)
        decay = log_decay.sum(3, keepdim=True).exp()
        return local, lambda factor, window: factor * decay[:, :, window]

    def followed(self, before: Tensor | None, pick: Pick, inside: Tensor) -> Tensor:
        dtype = working_dtype(self.rows.device)
        rows = pick(self.rows).to(dtype).masked_fill_(~inside, 0.0)
        log_decay = pick(self.log_decay).to(dtype).masked_fill_(~inside, 0.0)
        return self._stacked(before, rows, log_decay)

    def _stacked(self, before: Tensor | None, rows: Tensor, log_decay: Tensor) -> Tensor:
        seen = log_decay.cumsum(3)
        head = 0 if before is None else self.state
        out = rows.new_empty((self.batch, self.heads, rows.shape[2], head + rows.shape[3], self.state))
        if before is not None:
            torch.mul(before, seen[..., -1:, :].exp(), out=out[..., :head, :])
        if not self.passes_own_transition:
            seen = torch.cat([torch.zeros_like(seen[..., :1, :]), seen[..., :-1, :]], dim=3)
        torch.mul(rows.expand(self.batch, self.heads, -1, -1, -1), seen.exp_(), out=out[..., head:, :])
        return out


def _chunk_factors(side: FactorRows, ends: Sequence[int]) -> dict[int, Tensor]:
    """Return R over all rows before the chunks that `ends` lie in: chunk -> (B, H, N, N)."""
    chunk, state = side.chunk, side.state
    wanted = {end // chunk for end in ends}
    factors = {}
    factor = side.rows.new_zeros((side.batch, side.heads, state, state), dtype=working_dtype(side.rows.device))
    for slab in slabs(max(wanted), side.window_elements):
        window = slice(side.length - slab.stop * chunk, side.length - slab.start * chunk)
        local, carry = side.chunks(partial(_windows, window=window, chunk=chunk))
        if chunk > state and side.rows.device.type != "cpu":
            # All chunks at once, so that only small ones follow one another. A CPU takes one after the other anyway.
            local = triangular_factor(local)
        for k in range(slab.start, slab.stop):
            if k in wanted:
                factors[k] = factor
            newest_first = slab.stop - 1 - k
            rows = local[:, :, newest_first]
            if k > 0 or chunk < state:
                rows = torch.cat([carry(factor, newest_first), rows], dim=-2)
            factor = triangular_factor(rows)
    factors[max(wanted)] = factor
    return factors


def _factors_at(side: FactorRows, chunk_factors: dict[int, Tensor], ends: Sequence[int]) -> Tensor:
    """Return R over the rows before each of `ends`, from the factor at the start of its chunk: (B, H, P, N, N)."""
    before = torch.stack([chunk_factors[end // side.chunk] for end in ends], dim=2)
    sizes = [end % side.chunk for end in ends]
    if max(sizes) == 0:
        return before
    pick, inside = windows_before(side.length, ends, sizes, side.rows.device)
    return triangular_factor(side.followed(before, pick, inside))


def windows_before(length: int, ends: Sequence[int], sizes: Sequence[int], device: torch.device) -> tuple[Pick, Tensor]:
    """Return a cut of the `sizes[w]` tokens before each of `ends`, newest first, into windows of the largest size.

    The second result, (W, K, 1) bool, is False at the places of shorter windows that hold an unrelated token.
    """
    newest = index_tensor([length - end for end in ends], device)[:, None]
    offset = torch.arange(max(sizes), device=device)
    inside = offset < index_tensor(sizes, device)[:, None]
    token = (newest + offset).clamp(max=length - 1)
    return lambda tensor: tensor[:, :, token], inside[..., None]


def _windows(tensor: Tensor, window: slice, chunk: int) -> Tensor:
    """Return a view of the tokens of `window` in chunks: (., ., L, N) -> (., ., W, K, N)."""
    samples, heads, _, state = tensor.shape
    return tensor[:, :, window].reshape(samples, heads, -1, chunk, state)
