"""Diagonal recurrences by matrix products: for heads whose values have several dimensions.

The sequence is cut into chunks. Inside a chunk the matrix T is built from the diagonal outwards: blocks of 1, 2, 4, ...
tokens are joined in pairs, and the square of T that a pair adds (rows of its right block, columns of its left block)
factorizes at the border between the two,

    T_ij = sum_n (q_i exp(sum_{border..i} g)) (exp(sum_{j+1..border-1} g) k_j),

with both exponents at most 0. So every entry is a product of bounded factors, whatever the decay is; the usual single
reference point per chunk needs exp(+sum g), which overflows. Between chunks the N x V state is handed on.

Shapes: B batch, H heads, L length, M chunks, C tokens per chunk, S tokens per block, N state, V value dimensions;
b, h, l, n are B, H, L, N or 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32
"""Tokens per chunk. T of a chunk costs C per token and handing on N per token, so C of about N and more is balanced;
32 was as fast as 16 and 64 at lengths of 32 and 128 on one CPU core and pads short sequences least."""


class _Decays(NamedTuple):
    """What the tokens of a sequence lose, as factors in 0..1."""

    pairs: list[tuple[Tensor, Tensor]]
    """For blocks of 1, 2, 4, ... tokens: from the start of each right block up to and including its tokens, and from
    after each token of a left block to that block's end."""
    since_start_bhMCn: Tensor
    """From the start of the chunk up to and including each token."""
    until_end_bhMCn: Tensor
    """From after each token to the end of the chunk."""


def chunked_scan(q_BHLN: Tensor, k_BHLN: Tensor, v_BHLV: Tensor, log_decay_bhln: Tensor) -> Tensor:
    """y = T v of the recurrence with this log-decay. (B, H, L, V)."""
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
        carried_BHMCV = (_but_first(q) * _but_first(decays.since_start_bhMCn)) @ _hand_on(added_BHMNV, kept_bhMn1)
        y_BHMCV = torch.cat([y_BHMCV[:, :, :1], y_BHMCV[:, :, 1:] + carried_BHMCV], dim=2)
    return y_BHMCV.flatten(2, 3)[:, :, :length]


def chunked_sum(q_BHLN: Tensor, k_BHLN: Tensor, v_BHLV: Tensor) -> Tensor:
    """y = T v without decay, T = tril(q k^T). (B, H, L, V)."""
    length = q_BHLN.shape[2]
    chunk = _chunk_size(length)
    q, k, v = (torch.unflatten(_pad(x, chunk), 2, (-1, chunk)) for x in (q_BHLN, k_BHLN, v_BHLV))
    y_BHMCV = (q @ k.mT).tril() @ v
    if length > chunk:
        state_BHMNV = (_but_last(k).mT @ _but_last(v)).cumsum(dim=2)
        y_BHMCV = torch.cat([y_BHMCV[:, :, :1], y_BHMCV[:, :, 1:] + _but_first(q) @ state_BHMNV], dim=2)
    return y_BHMCV.flatten(2, 3)[:, :, :length]


def _within(q_BHLN: Tensor, k_BHLN: Tensor, decays: _Decays) -> Tensor:
    """T of every chunk, (B, H, M, C, C)."""
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


def _hand_on(added_BHMNV: Tensor, kept_bhMn1: Tensor) -> Tensor:
    """State at the end of every chunk from what each chunk adds to it and keeps of it."""
    added = added_BHMNV.unbind(2)
    kept = kept_bhMn1.unbind(2) if kept_bhMn1.shape[2] == len(added) else kept_bhMn1.unbind(2) * len(added)
    states = [added[0]]
    for new, factor in zip(added[1:], kept[1:], strict=True):
        states.append(torch.addcmul(new, factor, states[-1]))
    return torch.stack(states, dim=2)


def _fixed_decays(log_decay_bh1n: Tensor, chunk: int) -> _Decays:
    """Factors of a decay that is the same at every token: powers, shared by all blocks."""
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
    """Factors of a decay per token. Sums are only ever added to, so they keep their relative accuracy."""
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
    """A power of two, no longer than it has to be for a short sequence."""
    return min(CHUNK, 1 << (length - 1).bit_length())


def _pad(x: Tensor, chunk: int) -> Tensor:
    """Zeros at the end up to whole chunks: tokens that add nothing and come after all others."""
    missing = -x.shape[2] % chunk
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _halves(x_BHLN: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Left and right blocks of all pairs, each (B, H, pairs, S, N)."""
    left, right = torch.unflatten(x_BHLN, 2, (-1, 2, block)).unbind(3)
    return left, right


def _but_last(x: Tensor) -> Tensor:
    """All chunks but the last; a factor shared by all chunks stays."""
    return x if x.shape[2] == 1 else x[:, :, :-1]


def _but_first(x: Tensor) -> Tensor:
    """All chunks but the first; a factor shared by all chunks stays."""
    return x if x.shape[2] == 1 else x[:, :, 1:]
