"""Diagonal recurrences by their state: for channels whose value is one number (S6).

There the state is no larger than k, so that it is cheaper to have it at every token than to go round it. Two passes:
all chunks step through their tokens at once, each from an empty state; then the states at the chunk ends are handed on
and added, decayed, to the tokens after them. Only products with decays in 0..1 occur.

Shapes: B batch, H channels, L length, M chunks, N state; b, h, l, n are B, H, L, N or 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16
"""Tokens per chunk: a sequence of L takes 16 + L / 16 steps. Faster than 8 and 32 at L = 128 on one CPU core."""


def stepped_scan(q_BHLN: Tensor, k_BHLN: Tensor, v_BHL1: Tensor, log_decay_bhln: Tensor) -> Tensor:
    """y = T v of the recurrence with this log-decay. (B, H, L, 1)."""
    length = q_BHLN.shape[2]
    chunk = min(CHUNK, length)
    added = _tokens(k_BHLN * v_BHL1, chunk)
    kept = _tokens(log_decay_bhln.exp(), chunk)
    states = [added[0]]
    decays = [kept[0]]
    for new, factor in zip(added[1:], kept[1:], strict=True):
        states.append(torch.addcmul(new, factor, states[-1]))
        decays.append(factor * decays[-1])
    if length > chunk:
        carried_BHMN = _hand_on(states[-1], decays[-1])
        states = [torch.addcmul(state, decay, carried_BHMN) for state, decay in zip(states, decays, strict=True)]
    state_BHLN = torch.stack(states, dim=3).flatten(2, 3)[:, :, :length]
    return (q_BHLN * state_BHLN).sum(-1, keepdim=True)


def _tokens(x: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """First, second, ... token of all chunks, each (B, H, M, N); a fixed decay is the same one every time."""
    if x.shape[2] == 1:
        return (x,) * chunk
    missing = -x.shape[2] % chunk
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    return torch.unflatten(x, 2, (-1, chunk)).unbind(3)


def _hand_on(last_BHMN: Tensor, kept_bhmn: Tensor) -> Tensor:
    """State before the first token of every chunk from the chunks' own last states and what they keep."""
    last = last_BHMN.unbind(2)
    kept = kept_bhmn.unbind(2) if kept_bhmn.shape[2] == len(last) else kept_bhmn.unbind(2) * len(last)
    before = [torch.zeros_like(last[0]), last[0]]
    for own, factor in zip(last[1:-1], kept[1:-1], strict=True):
        before.append(torch.addcmul(own, factor, before[-1]))
    return torch.stack(before, dim=2)
