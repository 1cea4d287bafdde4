"""Computes the factors of H_i and the product of all transitions, where these are diagonal plus rank one.

    A_t = diag(exp log_decay_t) + left_t right_t^T

A row x that is in the state becomes A_t x = exp(log_decay_t) * x + (right_t . x) left_t at every step. The product over
a window is kept as diagonal plus rank K, never as a matrix, because it telescopes:

    A_K ... A_1 = diag(decay) + sum_t (A_K ... A_{t+1} left_t) (right_t * product of the decays before t)^T

so the vectors left_t are carried through the window like the rows that enter the state, and the rest are running
products of decays. All windows take their steps together: a few of them one after another, which makes short windows,
and these are joined in pairs by products of matrices. The rows of O run back through A_t^T, where left and right change
places. Cost O(L N (N + K) + P N^3) for P positions.

Nothing is divided by a decay and nothing is inverted, so decays of exactly 0 and singular A_t are as good as
any. Rounding is relative to what entered a window, as it is in I - beta k k^T itself when beta is near 1.

Shapes as in `ess_monitor.ess.gramian`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor

from ess_monitor.ess.gramian import (
    Carry,
    FactorRows,
    Pick,
    by_reach,
    chunk_length,
    two_sided_cores,
    windows_before,
)
from ess_monitor.ess.linalg import index_tensor, slabs, working_dtype
from ess_monitor.ess.positions import tokens_in_reach
from ess_monitor.ess.row_squares import Passed, Windows, split_row_squares

VECTORS_PER_TOKEN = 8
"""Held at once while windows are processed, roughly."""

LOOPED_STEPS = 8
"""At least so many steps of a window are taken one after another, and fewer than twice as many, before it is joined."""

FORGOTTEN = -40.0
"""Log of a share of what was in a state, below which it is rounding."""

ROW_CHUNK = 16
"""Tokens of a window where norms of rows are computed: each row of a window takes one more step with all before it."""


@dataclass(frozen=True, eq=False)
class Transitions:
    """Holds the tensors that make A_t and the inputs: (B|1, H|1, L|1, N|1) each, in any floating dtype.

    The input vector of a step is beta_t k_t. Without `left` and `right`, A_t = (I - beta_t k_t k_t^T) diag(decay_t).
    """

    log_decay: Tensor
    beta: Tensor
    k: Tensor
    left: Tensor | None
    right: Tensor | None

    def steps(self, pick: Pick) -> Steps:
        """Return the steps of the tokens that are picked.

        Products are formed here, in the working dtype, and not where the operator is made: there they would be rounded
        to the dtype of the inputs and take memory for the whole sequence.
        """
        decay = self._picked(self.log_decay, pick).exp()
        k = self._picked(self.k, pick)
        entering = self._picked(self.beta, pick) * k
        if self.left is None or self.right is None:
            return Steps(decay, -entering, decay * k, entering)
        return Steps(decay, self._picked(self.left, pick), self._picked(self.right, pick), entering)

    def of(self, chosen: Tensor) -> Transitions:
        """Return the transitions of some samples and heads, (B, H) bool, as heads of one sample."""
        left, right = (None if tensor is None else _chosen(tensor, chosen) for tensor in (self.left, self.right))
        log_decay, beta, k = (_chosen(tensor, chosen) for tensor in (self.log_decay, self.beta, self.k))
        return Transitions(log_decay, beta, k, left, right)

    def since(self, first: int) -> Transitions:
        """Return the transitions of the tokens from `first` on."""
        left, right = (None if tensor is None else tensor[:, :, first:] for tensor in (self.left, self.right))
        log_decay, beta = (each if each.shape[2] == 1 else each[:, :, first:] for each in (self.log_decay, self.beta))
        return Transitions(log_decay, beta, self.k[:, :, first:], left, right)

    def log_norms(self) -> Tensor | None:
        """Return the log of a bound of ||A_t||, (B|1, H|1, L), in the working dtype.

        ||(I - beta k k^T) diag(decay)|| is at most max(1, |1 - beta ||k||^2|) times the largest decay. With `left` and
        `right` nothing is known: None.
        """
        if self.left is not None:
            return None
        dtype = working_dtype(self.k.device)
        beta = self.beta.expand(-1, -1, self.k.shape[2], -1)[..., 0]
        grows = (1.0 - beta * self.k.to(dtype).square().sum(-1)).abs().clamp(min=1.0).log()
        return self.log_decay.amax(-1).to(dtype) + grows

    def reach(self, q: Tensor, positions: Sequence[int]) -> Tensor:
        """Return `tokens_in_reach`, (B|1, H|1), for outputs that read with `q`. Without `log_norms` all are."""
        log_norms = self.log_norms()
        if log_norms is None:
            return torch.zeros((1, 1), dtype=torch.long, device=q.device)
        length, state = self.k.shape[2:]
        at = index_tensor(positions, q.device)
        log_decay = self.log_decay.expand(-1, -1, length, -1)
        beta = self.beta.expand(-1, -1, length, -1)
        norm = self.k.to(working_dtype(q.device)).norm(dim=-1)
        read, k = q[:, :, at], self.k[:, :, at]
        read = (read - beta[:, :, at] * (read * k).sum(-1, keepdim=True) * k) * log_decay[:, :, at].exp()
        outputs, first_read = (each.to(norm.dtype).norm(dim=-1) for each in (q, read))
        return tokens_in_reach(log_norms, beta[..., 0].abs() * norm, outputs, first_read, positions, state)

    def newest_first(self) -> Transitions:
        """Return the transitions with time reversed."""
        left, right = (None if tensor is None else tensor.flip(2) for tensor in (self.left, self.right))
        return Transitions(self.log_decay.flip(2), self.beta.flip(2), self.k.flip(2), left, right)

    def _picked(self, tensor: Tensor, pick: Pick) -> Tensor:
        return pick(tensor.expand(-1, -1, self.k.shape[2], -1)).to(working_dtype(tensor.device))


def _chosen(tensor: Tensor, chosen: Tensor) -> Tensor:
    """Return some samples and heads, (B, H) bool, as heads of one sample."""
    return tensor.expand(*chosen.shape, -1, -1)[chosen][None]


@dataclass(frozen=True, eq=False)
class Steps:
    """Holds x <- decay * x + (right . x) left + entering: (B|1, H|1, W, K, N|1) each, in the working dtype."""

    decay: Tensor
    left: Tensor
    right: Tensor
    entering: Tensor

    def transposed(self, entering: Tensor) -> Steps:
        """Return steps through A^T; each entering row passes the transition of its own step."""
        weight = (self.left * entering).sum(-1, keepdim=True)
        return Steps(self.decay, self.right, self.left, entering * self.decay + weight * self.right)

    def within(self, inside: Tensor) -> Steps:
        """Return steps that change nothing and let nothing enter where `inside` (W, K, 1) is False."""
        left, right, entering = (tensor.masked_fill(~inside, 0.0) for tensor in (self.left, self.right, self.entering))
        return Steps(self.decay.masked_fill(~inside, 1.0), left, right, entering)

    def in_parts(self, parts: int, missing: int) -> Steps:
        """Return the steps of windows cut in `parts`, after `missing` steps before the oldest that change nothing."""
        padded = [F.pad(tensor, (0, 0, 0, missing)) for tensor in (self.left, self.right, self.entering)]
        decay = F.pad(self.decay, (0, 0, 0, missing), value=1.0)
        shape = (-1, padded[0].shape[3] // parts)
        return Steps(*(tensor.reshape(*tensor.shape[:2], *shape, tensor.shape[4]) for tensor in (decay, *padded)))


def delta_singular_values(
    transitions: Transitions, q: Tensor, positions: Sequence[int], batch: int, heads: int
) -> Tensor:
    """Return the singular values of every H_i: (B, H, P, min(N, largest min(i, L - i))), in the working dtype.

    `q` is (B|1, H|1, L, N). A head with NaN or Inf in it gives NaN.
    """

    def sides(chosen: Tensor | None) -> tuple[FactorRows, FactorRows]:
        if chosen is None or bool(chosen.all()):
            return _sides(transitions, q, len(positions), batch, heads)
        return _sides(transitions.of(chosen), _chosen(q, chosen), len(positions), 1, int(chosen.sum()))

    return by_reach(transitions.reach(q, positions).expand(batch, heads), sides, positions)


def delta_cores(transitions: Transitions, q: Tensor, positions: Sequence[int], batch: int, heads: int) -> Tensor:
    """Return matrices with the singular values of every H_i: (B, H, P, N, N), in the working dtype."""
    return two_sided_cores(*_sides(transitions, q, len(positions), batch, heads), positions)


def _sides(
    transitions: Transitions, q: Tensor, positions: int, batch: int, heads: int
) -> tuple[FactorRows, FactorRows]:
    length, state = q.shape[2:]
    # A longer chunk saves factorizations, and takes more products: all rows pass the transitions of all after them.
    chunk = min(chunk_length(length, state, positions), max(16, state))
    control = _DeltaRows(transitions.k.flip(2), False, batch, heads, chunk, transitions.newest_first())
    return control, _DeltaRows(q, True, batch, heads, chunk, transitions)


def delta_windows(transitions: Transitions, q: Tensor, batch: int, heads: int) -> Windows:
    """Return the windows in which squared norms of the rows of T are computed. `q` is (B|1, H|1, L, N)."""
    return _DeltaWindows(q, batch, heads, ROW_CHUNK, max(ROW_CHUNK, q.shape[3] // 2), transitions)


def delta_row_squares(
    transitions: Transitions, q: Tensor, batch: int, heads: int, position: int, start: int
) -> tuple[Tensor, Tensor]:
    """Return `split_row_squares`. On a CPU heads that have forgotten what was before the position begin there."""
    bound = transitions.log_norms()
    if bound is None or bound.device.type != "cpu":
        return split_row_squares(delta_windows(transitions, q, batch, heads), position, start)
    forgets = (bound.expand(-1, -1, q.shape[2])[:, :, position:start].sum(-1) < FORGOTTEN).expand(batch, heads)
    far, near = (torch.zeros((batch, heads), dtype=torch.float64) for _ in range(2))
    for chosen, first in ((forgets, position), (~forgets, 0)):
        if bool(chosen.any()):
            part, outputs = transitions.of(chosen).since(first), _chosen(q, chosen)[:, :, first:]
            windows = delta_windows(part, outputs, 1, outputs.shape[1])
            of_part = split_row_squares(windows, position - first, start - first)
            far[chosen], near[chosen] = (squares[0] for squares in of_part)
    return far, near


def transition_product_norm(transitions: Transitions, batch: int, heads: int, smallest: float) -> Tensor:
    """Return ||A_L ... A_1||_F, (B, H), in the working dtype; 0 where a bound of it is below `smallest`."""
    bound = transitions.log_norms()
    if bound is None or bound.device.type != "cpu":
        chosen = None
    else:
        total = bound.sum(-1) + 0.5 * math.log(transitions.k.shape[3])
        chosen = ~(total < math.log(smallest) - 1.0).expand(batch, heads)
    if chosen is None or bool(chosen.all()):
        norm: Tensor = torch.linalg.matrix_norm(transition_product(transitions, batch, heads))
        return norm
    norms = torch.zeros((batch, heads), dtype=torch.float64)
    if bool(chosen.any()):
        product = transition_product(transitions.of(chosen), 1, int(chosen.sum()))
        norms[chosen] = torch.linalg.matrix_norm(product).flatten()
    return norms


def transition_product(transitions: Transitions, batch: int, heads: int) -> Tensor:
    """Return A_L ... A_1: (B, H, N, N), in the working dtype."""
    length, state = transitions.k.shape[2:]
    device = transitions.k.device
    size = max(min(math.isqrt(length), max(32, 2 * state)), min(length, state // 2))
    ends = [*range(size, length, size), length]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    newest_first = transitions.newest_first()
    unit = torch.eye(state, dtype=working_dtype(device), device=device)
    transposed = unit.expand(batch, heads, -1, -1)
    for slab in slabs(len(ends), VECTORS_PER_TOKEN * batch * heads * size * state):
        pick, inside = windows_before(length, ends[slab], sizes[slab], device)
        windows = _Windows.of(newest_first.steps(pick).within(inside), batch, heads)
        for window in range(inside.shape[0]):
            transposed = windows.at(window).applied_to(transposed)
    return transposed.mT


def mean_diagonal(transitions: Transitions) -> Tensor:
    """Return the mean of A's diagonal over tokens and state dimensions, trace(A_t) / N: (B|1, H|1)."""
    length, state = transitions.k.shape[2:]
    totals = []
    for slab in slabs(length, VECTORS_PER_TOKEN * transitions.k[:, :, 0].numel()):
        steps = transitions.steps(itemgetter((slice(None), slice(None), slab)))
        totals.append((steps.decay + steps.left * steps.right).sum((2, 3)))
    return torch.stack(totals).sum(0) / (length * state)


@dataclass(frozen=True, eq=False)
class _DeltaRows(FactorRows):
    transitions: Transitions

    @property
    def window_elements(self) -> int:
        return VECTORS_PER_TOKEN * self.batch * self.heads * self.chunk * self.state

    def chunks(self, pick: Pick) -> tuple[Tensor, Carry]:
        windows = _Windows.of(self._steps(pick), self.batch, self.heads)
        return windows.rows, lambda factor, window: windows.at(window).applied_to(factor)

    def followed(self, before: Tensor | None, pick: Pick, inside: Tensor) -> Tensor:
        windows = _Windows.of(self._steps(pick).within(inside), self.batch, self.heads)
        return windows.rows if before is None else torch.cat([windows.applied_to(before), windows.rows], dim=-2)

    def _steps(self, pick: Pick) -> Steps:
        steps = self.transitions.steps(pick)
        return steps.transposed(pick(self.rows).to(steps.decay.dtype)) if self.passes_own_transition else steps


@dataclass(frozen=True, eq=False)
class _DeltaWindows(Windows):
    transitions: Transitions

    def passed(self, pick: Pick) -> Passed:
        windows = _Windows.of(self.transitions.steps(_newest_first(pick)), self.batch, self.heads)
        return Passed(windows.rows, windows.carry_gramians_)

    def passed_and_read(self, pick: Pick) -> Passed:
        outputs = pick(self.outputs).to(working_dtype(self.outputs.device))
        steps = self.transitions.steps(_newest_first(pick))
        windows = _Windows.looped(steps, self.batch, self.heads, outputs.flip(3))
        reads = _Windows.of(self.transitions.steps(pick).transposed(outputs), self.batch, self.heads)
        assert windows.squares is not None
        return Passed(windows.rows, windows.carry_gramians_, reads.rows.flip(3), windows.squares.flip(3))


def _newest_first(pick: Pick) -> Pick:
    return lambda tensor: pick(tensor).flip(3)


@dataclass(frozen=True, eq=False)
class _Windows:
    """Holds what steps have done by the end of windows; the transitions multiply to diag(decay) + left^T right."""

    rows: Tensor
    """(B, H, W, K, N), oldest first: all that entered. `left` and `right` have this shape."""
    left: Tensor
    right: Tensor
    decay: Tensor
    """(B, H, W, 1, N)."""

    squares: Tensor | None = None
    """(B, H, W, K), newest first: squares of what each output saw of `rows` of its window. None without outputs."""

    @classmethod
    def of(cls, steps: Steps, batch: int, heads: int) -> _Windows:
        """Take the steps of parts of each window one after another, and join the parts in pairs."""
        length = steps.left.shape[3]
        joins = max(0, (length // LOOPED_STEPS).bit_length() - 1)
        parts = 2**joins
        missing = -length % parts
        joined = cls.looped(steps.in_parts(parts, missing), batch, heads)
        for _ in range(joins):
            newer, older = joined.at(slice(0, None, 2)), joined.at(slice(1, None, 2))
            size = older.rows.shape[-2]
            carried = newer.applied_to(torch.cat([older.rows, older.left], dim=-2))
            joined = _Windows(
                torch.cat([carried[..., :size, :], newer.rows], dim=-2),
                torch.cat([carried[..., size:, :], newer.left], dim=-2),
                torch.cat([older.right, newer.right * older.decay], dim=-2),
                newer.decay * older.decay,
            )
        rows, left, right = (tensor[..., missing:, :] for tensor in (joined.rows, joined.left, joined.right))
        return cls(rows, left, right, joined.decay)

    @classmethod
    def looped(cls, steps: Steps, batch: int, heads: int, outputs: Tensor | None = None) -> _Windows:
        """Take all steps one after another; `outputs` (B|1, H|1, W, K, N) read the state after each of them."""
        windows, length, state = steps.left.shape[2:]
        # Time first and everything else dense: each operation of a step is one pass over contiguous memory.
        decay, left, right, entering = (
            tensor.expand(batch, heads, windows, length, state).permute(3, 0, 1, 2, 4).contiguous()
            for tensor in (steps.decay, steps.left, steps.right, steps.entering)
        )
        carried = left.new_empty((length, 2, *left.shape[1:]))
        reads = torch.empty_like(right)
        decayed = torch.ones_like(decay[0])
        squares = None if outputs is None else decayed.new_empty((batch, heads, windows, length))
        for age, step in enumerate(reversed(range(length))):
            present = carried[:age]
            weight = (present * right[step]).sum(-1, keepdim=True)
            present.mul_(decay[step]).addcmul_(weight, left[step])
            carried[age, 0], carried[age, 1] = entering[step], left[step]
            torch.mul(right[step], decayed, out=reads[age])
            decayed *= decay[step]
            if outputs is not None and squares is not None:
                squares[..., step] = (carried[: age + 1, 0] * outputs[:, :, :, step]).sum(-1).square().sum(0)
        rows, carried_left = carried.permute(1, 2, 3, 4, 0, 5).unbind(0)
        return cls(rows, carried_left, reads.permute(1, 2, 3, 0, 4), decayed[..., None, :], squares)

    def at(self, window: int | slice) -> _Windows:
        return _Windows(*(tensor[:, :, window] for tensor in (self.rows, self.left, self.right, self.decay)))

    def carry_gramians_(self, gramians: Tensor, window: int) -> None:
        """Replace Gramians G (B, H, M, N, N) by A G A^T, with the product A = D + left^T right of one window.

        A G A^T = D G D + Y^T left + left^T Y  with  Y = X D + X right^T left / 2,  X = right G.
        """
        left, right, decay = (tensor[:, :, window, None] for tensor in (self.left, self.right, self.decay))
        x = right @ gramians
        y = torch.addcmul(0.5 * (x @ right.mT) @ left, x, decay)
        gramians *= decay * decay.mT
        gramians += torch.cat([left.expand_as(y), y], dim=-2).mT @ torch.cat([y, left.expand_as(y)], dim=-2)

    def applied_to(self, rows: Tensor) -> Tensor:
        """Return `rows` (..., M, N) at the start of windows as they are at the end."""
        return torch.addcmul(rows @ self.right.mT @ self.left, rows, self.decay)
