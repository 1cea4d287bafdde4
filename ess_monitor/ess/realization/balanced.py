"""Computes balanced realizations: a recurrence for T whose state dimensions are the singular vectors of each H_i.

With H_i = U_i S_i V_i^T the state of the realization is V_i^T u_{:i}, its input-state projection (B.2.4 of the paper up
to a scale of each dimension):

    A_i = V_{i+1}[:-d]^T V_i,   B_i = V_{i+1}[-d:]^T,   C_i = the first d rows of U_i S_i,   D_i = T_ii

No pseudo-inverse is needed in this scale, [A_i B_i] has norm 1 at most, and dimensions that carry little carry little
error. A truncation keeps the first dimensions of each state.

A recurrence with a state of N gives V_i without T: C_i^T = Q R, with Q carried along by the same QR decompositions as R
(`ess_monitor.ess.gramian`), and V_i = Q W from the N x N matrix R_O R^T = U S W^T. Cost O(L N^3).

Shapes: B batch, H heads, L length, N state, K tokens of a chunk, R state dimensions that are kept, E x D a block of T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ess_monitor.ess.linalg import SLAB_ELEMENTS, singular_vectors_, triangular_factor
from ess_monitor.ess.realization.state_space import StateSpace

Sizes = Callable[[Tensor, Tensor], Tensor]
"""Singular values (..., rank) and the rounding in them (..., 1) -> how many of them to keep, (...)."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Holds A (B, H, L, R, R), B (B, H, L, R, D), C (B, H, L, E, R), D (B, H, L, E, D) and sizes (B, H, L)."""

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    sizes: Tensor


NAMES = tuple(field.name for field in fields(Parts))


@dataclass(frozen=True, eq=False)
class _Basis:
    """Holds V_i as far as A, B and C need it, for neighboring positions: (B, H, K, ., .) each."""

    W: Tensor
    """Columns are the state dimensions, those that are not kept are 0."""
    sizes: Tensor
    """(B, H, K)."""


def realized_by_factors(recurrence: StateSpace, batch: int, heads: int, sizes: Sizes) -> Parts:
    """Return the realization of a recurrence."""
    length, state = recurrence.length, recurrence.state
    observation = _observation_factors(recurrence, batch, heads)
    full = (batch, heads, 1, state, state)
    before = observation.new_zeros((batch, heads, state, state))  # R of C_i, at the first position of the chunk
    W, kept = observation.new_zeros(full), observation.new_zeros((batch, heads, 1))
    parts = []
    for tokens in _chunks(length, batch * heads * state * state):
        control, orthogonal = _control_factors(recurrence, tokens, before, batch, heads)
        after = control[:, :, 1:]
        following = slice(tokens.start + 1, tokens.stop + 1)
        basis = _basis(observation[:, :, following], after, following, length, sizes)
        now = torch.cat([W, basis.W[:, :, :-1]], dim=2)
        entering = basis.W.mT @ orthogonal.mT  # (B, H, K, N, N + 1)
        c = recurrence.c[:, :, tokens, None]
        parts.append(
            Parts(
                entering[..., :-1] @ now,
                entering[..., -1:],
                c.expand(batch, heads, -1, -1, -1) @ control[:, :, :-1].mT @ now,
                recurrence.d[:, :, tokens, None, None].expand(batch, heads, -1, -1, -1),
                torch.cat([kept, basis.sizes[:, :, :-1]], dim=2),
            )
        )
        before, W, kept = after[:, :, -1], basis.W[:, :, -1:], basis.sizes[:, :, -1:]
    joined = Parts(*(torch.cat([getattr(part, name) for part in parts], dim=2) for name in NAMES))
    largest = int(joined.sizes.max())
    return Parts(
        joined.A[..., :largest, :largest],
        joined.B[..., :largest, :],
        joined.C[..., :largest],
        joined.D,
        joined.sizes,
    )


def control_factors(recurrence: StateSpace, batch: int, heads: int, last: int) -> Iterator[Tensor]:
    """Yield R of C_i for i = 1..last: (B, H, N, N)."""
    factor = recurrence.b.new_zeros((batch, heads, recurrence.state, recurrence.state))
    for tokens in _chunks(last, batch * heads * recurrence.state**2):
        A = recurrence.A(tokens)
        for k, token in enumerate(range(tokens.start, tokens.stop)):
            entering = recurrence.b[:, :, token, None].expand(batch, heads, -1, -1)
            factor = triangular_factor(torch.cat([factor @ A[:, :, k].mT, entering], dim=2))
            yield factor


def _chunks(length: int, elements_each: int) -> Iterator[slice]:
    step = max(1, min(256, SLAB_ELEMENTS // max(1, elements_each)))
    for start in range(0, length, step):
        yield slice(start, min(length, start + step))


def _observation_factors(recurrence: StateSpace, batch: int, heads: int) -> Tensor:
    """Return R of O_i for i = 0..L: (B, H, L + 1, N, N), of which the first is not used and stays 0."""
    length, state = recurrence.length, recurrence.state
    factors = recurrence.b.new_zeros((batch, heads, length + 1, state, state))
    for tokens in reversed(list(_chunks(length, batch * heads * state * state))):
        A = recurrence.A(tokens)
        for token in reversed(range(max(1, tokens.start), tokens.stop)):
            read = recurrence.c[:, :, token, None].expand(batch, heads, -1, -1)
            later = factors[:, :, token + 1] @ A[:, :, token - tokens.start]
            factors[:, :, token] = triangular_factor(torch.cat([read, later], dim=2))
    return factors


def _control_factors(
    recurrence: StateSpace, tokens: slice, before: Tensor, batch: int, heads: int
) -> tuple[Tensor, Tensor]:
    """Return R of C_i before and after each token (B, H, K + 1, N, N), and the Q of each step (B, H, K, N + 1, N).

    C_{i+1}^T = diag(Q_i, 1) [R_i A_i^T; b_i^T], and the QR decomposition of the last matrix gives R_{i+1}.
    """
    A = recurrence.A(tokens)
    factors, orthogonal = [before], []
    for k, token in enumerate(range(tokens.start, tokens.stop)):
        entering = recurrence.b[:, :, token, None].expand(batch, heads, -1, -1)
        Q, R = torch.linalg.qr(torch.cat([factors[-1] @ A[:, :, k].mT, entering], dim=2))
        factors.append(R)
        orthogonal.append(Q)
    return torch.stack(factors, dim=2), torch.stack(orthogonal, dim=2)


def _basis(observation: Tensor, control: Tensor, positions: slice, length: int, sizes: Sizes) -> _Basis:
    """Return the right singular vectors of R_O R_C^T, as far as they are kept."""
    scale = observation.flatten(-2).norm(dim=-1) * control.flatten(-2).norm(dim=-1)
    values, W = singular_vectors_(observation @ control.mT)
    rounding = torch.finfo(values.dtype).eps * values.shape[-1] * scale[..., None]
    place = torch.arange(positions.start, positions.stop, device=W.device)
    kept = torch.minimum(sizes(values, rounding), torch.minimum(place, length - place).to(values.dtype))
    beyond = torch.arange(W.shape[-1], device=W.device) >= kept[..., None, None]
    return _Basis(W.masked_fill_(beyond, 0.0), kept)


def realized_from_blocks(T: Tensor, length: int, sizes: Sizes) -> Parts:
    """Return the realization of T (B, H, E L, D L), from the SVD of every H_i. Nothing above its diagonal is read."""
    batch, heads = T.shape[:2]
    rows, columns = (size // length for size in T.shape[2:])
    V = T.new_zeros((batch, heads, 0, 0))  # of H_0, without inputs
    C = T.new_zeros((batch, heads, rows, 0))
    kept = T.new_zeros((batch, heads))
    each: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    for i in range(length):
        each["C"].append(C)
        each["D"].append(T[:, :, rows * i : rows * (i + 1), columns * i : columns * (i + 1)])
        each["sizes"].append(kept)
        known = V.shape[2]
        if i + 1 < length:
            H = T[:, :, rows * (i + 1) :, : columns * (i + 1)]
            values, right = singular_vectors_(H.clone())
            rounding = torch.finfo(T.dtype).eps * values.shape[-1] * values[..., :1]
            kept = sizes(values, rounding)
            beyond = torch.arange(values.shape[-1], device=T.device) >= kept[..., None, None]
            largest = int(kept.max())
            following = right.masked_fill_(beyond, 0.0)[..., :largest]
            C = H[..., :rows, :] @ following
        else:
            following = T.new_zeros((batch, heads, columns * length, 0))
        each["A"].append(following[:, :, :known].mT @ V)
        each["B"].append(following[:, :, known:].mT)
        V = following
    largest = max(state.shape[-1] for state in each["C"])
    return Parts(
        torch.stack([_padded(A, largest, largest) for A in each["A"]], dim=2),
        torch.stack([_padded(B, largest, columns) for B in each["B"]], dim=2),
        torch.stack([_padded(C, rows, largest) for C in each["C"]], dim=2),
        torch.stack(each["D"], dim=2),
        torch.stack(each["sizes"], dim=2),
    )


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[-1], 0, rows - matrix.shape[-2]))
