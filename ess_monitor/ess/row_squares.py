"""Computes squared norms of the rows of a recurrence's operator, split at a position, without forming the rows.

Cut the sequence into windows. With O the vectors by which the outputs of a window read the state at its start, and C
those that earlier tokens have left there,

    ||O C^T||_F^2 = <O^T O, C^T C>,

an inner product of two N x N Gramians. The second one is carried through the sequence, G' = A G A^T + E^T E for what
enters in a window, once for the tokens before the position and once for those after it. What outputs see of their own
window is formed entry by entry. Decays are multiplied and never divided by, so that decays of exactly 0 are as good as
any. Cost O(L N^2).

A Gramian squares the condition number: where what is left in the state cancels in every output, entries of T below 1e-8
of |O| |C| are rounding (in float64). Singular values need better than that; a share of the whole does not.

Shapes: B batch, H heads, L length, N state, W windows of K tokens each. Dimensions of size 1 of the inputs stay
broadcast for as long as possible.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ess_monitor.ess.gramian import Pick
from ess_monitor.ess.linalg import slabs, working_dtype

CHUNK = 64
"""Tokens of a window of a diagonal recurrence, at most: a power of two."""


@dataclass(frozen=True, eq=False)
class Passed:
    """Holds what windows of tokens do to the state, and what their outputs see."""

    columns: Tensor
    """(B|1, H|1, W, K, N): what each token has left in the state at the end of its window."""
    carry_: Callable[[Tensor, int], None]
    """Takes Gramians G (B, H, ., N, N) from the start of one of the windows to its end, A G A^T, in place."""
    rows: Tensor | None = None
    """(B|1, H|1, W, K, N), in the order of the tokens: how each output reads the state at the start of its window. None
    where not asked for."""
    within: Tensor | None = None
    """(B|1, H|1, W, K): sum of the squared entries of T in the row of each token, between tokens of the same window."""


@dataclass(frozen=True, eq=False)
class Windows(ABC):
    """Passes tokens through a recurrence, window by window; subclasses define the transition.

    Where `pick` adds zeros there is no token: a transition that changes nothing, no input and no output.
    """

    outputs: Tensor
    """(B|1, H|1, L, N): how each output reads the state."""
    batch: int
    heads: int
    chunk: int
    """Tokens of a window, K."""
    unread_chunk: int
    """Those of a window whose outputs are not looked at."""

    @abstractmethod
    def passed(self, pick: Pick) -> Passed:
        """Pass the tokens through windows."""

    @abstractmethod
    def passed_and_read(self, pick: Pick) -> Passed:
        """Do so, and look at the outputs, too."""


def diagonal_windows(
    log_decay: Tensor, b: Tensor, c: Tensor, longest: int, batch: int, heads: int, *, present: bool
) -> Windows:
    """Return the windows of a diagonal recurrence, for at most `longest` tokens without a cut.

    `log_decay` is (B|1, H|1, L|1, N|1); `b` and `c` are (B|1, H|1, L, N). `present` says whether an output sees its own
    token.
    """
    chunk = min(CHUNK, 1 << (longest - 1).bit_length())
    unread_chunk = min(max(CHUNK, c.shape[3]), longest)
    return _DiagonalWindows(c, batch, heads, chunk, unread_chunk, log_decay, b, present)


def split_row_squares(windows: Windows, position: int, start: int) -> tuple[Tensor, Tensor]:
    """Return ||T[start:, :position]||_F^2 and ||T[start:, position:]||_F^2: (B, H) each, in the working dtype."""
    batch, heads, (length, state) = windows.batch, windows.heads, windows.outputs.shape[2:]
    dtype, device = working_dtype(windows.outputs.device), windows.outputs.device
    # Of the tokens after the position (0), and of those before it (1).
    gramians = torch.zeros((batch, heads, 2 if position else 1, state, state), dtype=dtype, device=device)
    squares = torch.zeros((batch, heads, 2), dtype=dtype, device=device)
    for side, first, stop in ((1, 0, position), (0, position, start), (0, start, length)):
        present = gramians[:, :, side:]
        is_read = stop > start
        for pick in _picks(windows, first, stop, windows.chunk if is_read else windows.unread_chunk):
            by = windows.passed_and_read(pick) if is_read else windows.passed(pick)
            entering = by.columns.mT @ by.columns
            reading = None if by.rows is None else by.rows.mT @ by.rows
            if by.within is not None:
                squares[..., 0] += by.within.sum((2, 3))
            for window in range(entering.shape[2]):
                if reading is not None:
                    seen = gramians.flatten(3) @ reading[:, :, window].flatten(2)[..., None]
                    squares[..., : gramians.shape[2]] += seen[..., 0].clamp_(min=0.0)
                by.carry_(present, window)
                gramians[:, :, side] += entering[:, :, window]
    return squares[..., 1], squares[..., 0]


def row_squares(windows: Windows) -> Tensor:
    """Return ||T[i]||^2 of every row i: (B, H, L), in the working dtype."""
    batch, heads, (length, state) = windows.batch, windows.heads, windows.outputs.shape[2:]
    dtype, device = working_dtype(windows.outputs.device), windows.outputs.device
    gramian = torch.zeros((batch, heads, 1, state, state), dtype=dtype, device=device)
    squares = []
    for pick in _picks(windows, 0, length, windows.chunk):
        by = windows.passed_and_read(pick)
        assert by.rows is not None
        assert by.within is not None
        entering = by.columns.mT @ by.columns
        for window in range(entering.shape[2]):
            rows = by.rows[:, :, window]
            seen = ((rows @ gramian[:, :, 0]) * rows).sum(-1).clamp_(min=0.0)
            squares.append(seen + by.within[:, :, window])
            by.carry_(gramian, window)
            gramian[:, :, 0] += entering[:, :, window]
    return torch.cat(squares, dim=2)[..., :length]


@dataclass(frozen=True, eq=False)
class _DiagonalWindows(Windows):
    """Passes tokens through diag(exp(log_decay_t)).

    T_ij = sum_n c_i[n] exp(log_decay_{j+1}[n] + ... + log_decay_i[n]) b_j[n] for i > j, and for i = j unless
    `present` is False.
    """

    log_decay: Tensor
    """(B|1, H|1, L|1, N|1)."""
    inputs: Tensor
    """(B|1, H|1, L, N): how each input enters the state."""
    present: bool
    """Whether an output sees its own token."""

    def passed(self, pick: Pick) -> Passed:
        # Newest first, what is left of a token is a running sum.
        log_decay = self._log_decay(pick).flip(3)
        left = F.pad(log_decay, (0, 0, 1, -1)).cumsum(3, dtype=working_dtype(log_decay.device)).flip(3).exp_()
        oldest = log_decay[..., -1:, :].to(left.dtype).exp()
        return Passed(pick(self.inputs) * left, _carry_through(left[..., :1, :] * oldest))

    def passed_and_read(self, pick: Pick) -> Passed:
        """Join neighboring blocks of tokens until they are windows.

        The outputs of the newer block see of the older one what its tokens have left in the state at its end.
        """
        inputs, outputs, log_decay = pick(self.inputs), pick(self.outputs), self._log_decay(pick)
        decay = log_decay.to(working_dtype(inputs.device)).exp()
        columns, rows = inputs + torch.zeros_like(decay), outputs * decay
        within = (columns * outputs).sum(-1).square_()
        within = within if self.present else torch.zeros_like(within)
        block = 1
        while block < self.chunk:
            (older, _), (_, newer) = _halves(columns, block), _halves(rows, block)
            older_decay, newer_decay = _halves(decay, 1)
            seen = (newer @ older.mT).square_().sum(-1)
            within = within + torch.stack([torch.zeros_like(seen), seen], dim=4).flatten(3)
            older *= newer_decay
            newer *= older_decay
            decay, block = (older_decay * newer_decay).squeeze(4), 2 * block
        return Passed(columns, _carry_through(decay), rows, within)

    def _log_decay(self, pick: Pick) -> Tensor:
        return pick(self.log_decay.expand(-1, -1, self.outputs.shape[2], -1))


def _carry_through(decay: Tensor) -> Callable[[Tensor, int], None]:
    """Return the carry through windows with decays (B|1, H|1, W, 1, N|1)."""
    both = decay.mT * decay

    def carry_(gramians: Tensor, window: int) -> None:
        gramians *= both[:, :, window, None]

    return carry_


def _picks(windows: Windows, start: int, stop: int, chunk: int) -> list[Pick]:
    """Return cuts of the tokens start..stop into windows, a few at a time; the last window is filled up with zeros."""
    state = windows.outputs.shape[3]
    several = slabs(-(-(stop - start) // chunk), windows.batch * windows.heads * max(chunk, state) * state)
    tokens = (slice(start + slab.start * chunk, min(stop, start + slab.stop * chunk)) for slab in several)
    return [partial(_windows, tokens=each, chunk=chunk) for each in tokens]


def _windows(tensor: Tensor, tokens: slice, chunk: int) -> Tensor:
    """Return the tokens in windows, the last one filled up with zeros: (., ., L, N) -> (., ., W, K, N)."""
    part = tensor[:, :, tokens]
    missing = -part.shape[2] % chunk
    part = F.pad(part, (0, 0, 0, missing)) if missing else part
    return part.reshape(*part.shape[:2], -1, chunk, part.shape[3])


def _halves(windows: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return the older and the newer ones of neighboring blocks, as views.

    (., ., W, K, N) -> (., ., W, K / (2 block), block, N), twice.
    """
    older, newer = windows.view(*windows.shape[:3], -1, 2, block, windows.shape[4]).unbind(4)
    return older, newer
