"""Computes y = T v of diagonal recurrences in chunks: by matrix products, or by the states.

`chunked_scan` is for heads whose values have several dimensions. Inside a chunk the matrix T is built from the diagonal
outwards: blocks of 1, 2, 4, ... tokens are joined in pairs, and the square of T that a pair adds (rows of its right
block, columns of its left block) factorizes at the border between the two,

    T_ij = sum_n (q_i exp(sum_{border..i} g)) (exp(sum_{j+1..border-1} g) k_j),

with both exponents at most 0. So every entry is a product of bounded factors, whatever the decay is; the usual single
reference point per chunk needs exp(+sum g), which overflows. Between chunks the N x V state is handed on.

`stepped_scan` is for channels whose value is one number (S6). There the state is no larger than k, so that it costs
less to compute it at every token. All chunks step through their tokens at once, each from an empty state; then the
states at the chunk ends are handed on and added, decayed, to the tokens after them. Only products with decays in 0..1
occur.

Shapes: B batch, H heads or channels, L length, M chunks, C tokens per chunk, S tokens per block, N state, V value
dimensions; b, h, l, n are B, H, L, N or 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32
"""Tokens per chunk. T of a chunk costs C per token and handing on N per token, so C of about N and more is balanced;
32 was as fast as 16 and 64 at lengths of 32 and 128 on one CPU core and pads short sequences least."""

STEPPED_CHUNK = 16
"""Tokens per chunk of `stepped_scan`: a sequence of L takes 16 + L / 16 steps. Faster than 8 and 32 at L = 128 on one
CPU core."""


class _Decays(NamedTuple):
    """Holds the decay between tokens, as factors in 0..1."""

    pairs: list[tuple[Tensor, Tensor]]
    """For blocks of 1, 2, 4, ... tokens: from the start of each right block up to and including its tokens, and from
    after each token of a left block to that block's end."""
    since_start_bhMCn: Tensor
    """From the start of the chunk up to and including each token."""
    until_end_bhMCn: Tensor
    """From after each token to the end of the chunk."""


def chunked_scan(q_BHLN: Tensor, k_BHLN: Tensor, v_BHLV: Tensor, log_decay_bhln: Tensor) -> Tensor:
    """Return y = T v, (B, H, L, V), of the recurrence with this log-decay, by matrix products."""
    length = q_BHLN.shape[2]
    chunk = _chunk_size(length)
    if log_decay_bhln.shape[2] == 1:
        decays = _fixed_decays(log_decay_bhln, chunk)
    else:
        decays = _varying_decays(_pad(log_decay_bhln, chunk), chunk)
    q, k, v = (_pad(x, chunk) for x in (q_BHLN, k_BHLN, v_BHLV))
    y_BHMCV = _within(q, k, decays) @ torch.unflatten(v, 2, (-1, chunk))
    if length > chunk:
        q, k, v = (torch.unflatten(x, 2, (-1, chunk)) for x in (q, k, v))
        added_BHMNV = (_but_last(k) * _but_last(decays.until_end_bhMCn)).mT @ _but_last(v)
        kept_bhMn1 = _but_last(decays.since_start_bhMCn)[..., -1, :, None]
        kept = _per_chunk(kept_bhMn1, added_BHMNV.shape[2])
        states_BHMNV = torch.stack(_states(added_BHMNV.unbind(2), kept), dim=2)
        carried_BHMCV = (_but_first(q) * _but_first(decays.since_start_bhMCn)) @ states_BHMNV
        y_BHMCV = torch.cat([y_BHMCV[:, :, :1], y_BHMCV[:, :, 1:] + carried_BHMCV], dim=2)
    return y_BHMCV.flatten(2, 3)[:, :, :length]


def chunked_sum(q_BHLN: Tensor, k_BHLN: Tensor, v_BHLV: Tensor) -> Tensor:
    """Return y = T v, (B, H, L, V), without decay: T = tril(q k^T)."""
    length = q_BHLN.shape[2]
    chunk = _chunk_size(length)
    q, k, v = (torch.unflatten(_pad(x, chunk), 2, (-1, chunk)) for x in (q_BHLN, k_BHLN, v_BHLV))
    y_BHMCV = (q @ k.mT).tril() @ v
    if length > chunk:
        state_BHMNV = (_but_last(k).mT @ _but_last(v)).cumsum(dim=2)
        y_BHMCV = torch.cat([y_BHMCV[:, :, :1], y_BHMCV[:, :, 1:] + _but_first(q) @ state_BHMNV], dim=2)
    return y_BHMCV.flatten(2, 3)[:, :, :length]


def stepped_scan(q_BHLN: Tensor, k_BHLN: Tensor, v_BHL1: Tensor, log_decay_bhln: Tensor) -> Tensor:
    """Return y = T v, (B, H, L, 1), of the recurrence with this log-decay, from the state at every token."""
    length = q_BHLN.shape[2]
    chunk = min(STEPPED_CHUNK, length)
    added = _tokens(k_BHLN * v_BHL1, chunk)
    kept = _tokens(log_decay_bhln.exp(), chunk)
    states = _states(added, kept)
    if length > chunk:
        decays = list(accumulate(kept, lambda before, factor: factor * before))
        chunks = states[-1].shape[2]
        ends = _states(states[-1].unbind(2)[:-1], _per_chunk(decays[-1], chunks)[:-1])
        carried_BHMN = torch.stack([torch.zeros_like(ends[0]), *ends], dim=2)
        states = [torch.addcmul(state, decay, carried_BHMN) for state, decay in zip(states, decays, strict=True)]
    state_BHLN = torch.stack(states, dim=3).flatten(2, 3)[:, :, :length]
    return (q_BHLN * state_BHLN).sum(-1, keepdim=True)


def _within(q_BHLN: Tensor, k_BHLN: Tensor, decays: _Decays) -> Tensor:
    """Return T of every chunk, (B, H, M, C, C)."""
    T = (q_BHLN * k_BHLN).sum(-1)[..., None, None]  # blocks of one token
    for since_border, until_border in decays.pairs:
        block = T.shape[-1]
        right_q = _halves(q_BHLN, block)[1] * since_border
        left_k = _halves(k_BHLN, block)[0] * until_border
        square = right_q @ left_k.mT
        T_left, T_right = torch.unflatten(T, 2, (-1, 2)).unbind(3)
        T = torch.cat(
            [torch.cat([T_left, torch.zeros_like(square)], dim=-1), torch.cat([square, T_right], dim=-1)], dim=-2
        )
    return T


def _states(added: Sequence[Tensor], kept: Sequence[Tensor]) -> list[Tensor]:
    """Return s_i = added_i + kept_i s_{i-1} for every i, from an empty state."""
    states = [added[0]]
    for new, factor in zip(added[1:], kept[1:], strict=True):
        states.append(torch.addcmul(new, factor, states[-1]))
    return states


def _per_chunk(x: Tensor, chunks: int) -> tuple[Tensor, ...]:
    """Return the entry of every chunk, from dimension 2; an entry shared by all chunks is repeated."""
    return x.unbind(2) if x.shape[2] == chunks else x.unbind(2) * chunks


def _tokens(x: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """Return the first, second, ... token of all chunks, each (B, H, M, N); a fixed decay is repeated."""
    if x.shape[2] == 1:
        return (x,) * chunk
    return torch.unflatten(_pad(x, chunk), 2, (-1, chunk)).unbind(3)


def _fixed_decays(log_decay_bh1n: Tensor, chunk: int) -> _Decays:
    """Return factors of a decay that is the same at every token: powers, shared by all blocks."""
    count_C1 = torch.arange(1, chunk + 1, dtype=log_decay_bh1n.dtype, device=log_decay_bh1n.device)[:, None]
    power_bh1Cn = (count_C1 * log_decay_bh1n[:, :, None]).exp()
    # Not exp(0 * log_decay): that is NaN for a decay of exactly 0, whose logarithm is -inf.
    falling_bh1Cn = torch.cat([power_bh1Cn[..., :-1, :].flip(-2), torch.ones_like(power_bh1Cn[..., :1, :])], dim=-2)
    pairs = []
    block = 1
    while block < chunk:
        pairs.append((power_bh1Cn[..., :block, :], falling_bh1Cn[..., -block:, :]))
        block *= 2
    return _Decays(pairs, power_bh1Cn, falling_bh1Cn)


def _varying_decays(log_decay_bhLn: Tensor, chunk: int) -> _Decays:
    """Return factors of a decay per token. Sums are only ever added to, so they keep their relative accuracy."""
    since = log_decay_bhLn[..., None, :]
    until = torch.zeros_like(since)
    pairs = []
    while since.shape[-2] < chunk:
        since_left, since_right = torch.unflatten(since, 2, (-1, 2)).unbind(3)
        until_left, until_right = torch.unflatten(until, 2, (-1, 2)).unbind(3)
        pairs.append((since_right.exp(), until_left.exp()))
        since = torch.cat([since_left, since_right + since_left[..., -1:, :]], dim=-2)
        until = torch.cat([until_left + since_right[..., -1:, :], until_right], dim=-2)
    return _Decays(pairs, since.exp(), until.exp())


def _chunk_size(length: int) -> int:
    """Return a power of two, no longer than a short sequence needs."""
    return min(CHUNK, 1 << (length - 1).bit_length())


def _pad(x: Tensor, chunk: int) -> Tensor:
    """Append zeros up to whole chunks: tokens that add nothing and come after all others."""
    missing = -x.shape[2] % chunk
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _halves(x_BHLN: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return left and right blocks of all pairs, each (B, H, pairs, S, N)."""
    left, right = torch.unflatten(x_BHLN, 2, (-1, 2, block)).unbind(3)
    return left, right


def _but_last(x: Tensor) -> Tensor:
    """Return all chunks but the last; a factor shared by all chunks stays."""
    return x if x.shape[2] == 1 else x[:, :, :-1]


def _but_first(x: Tensor) -> Tensor:
    """Return all chunks but the first; a factor shared by all chunks stays."""
    return x if x.shape[2] == 1 else x[:, :, 1:]
