"""Forms T of a diagonal recurrence so that gradients go through it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ess_monitor.ess.operators.recurrence import DiagonalRecurrence


def differentiable_matrix(recurrence: DiagonalRecurrence) -> Tensor:
    """Return T, (batch, heads, L, L), with the gradients of the decays, b and c.

    Neighboring blocks of tokens are joined until one is left: the outputs of the newer one see what the tokens of the
    older one have left in the state. Decays are multiplied and never divided by, so a decay of 0 is as good as any.
    Segments are not regarded. Cost O(L^2 n).

    Examples:
        >>> decay = torch.tensor(0.5).log().expand(1, 1, 1, 1).requires_grad_()
        >>> T = differentiable_matrix(DiagonalRecurrence(decay, torch.ones(1, 1, 3, 1), torch.ones(1, 1, 3, 1)))
        >>> [round(value, 3) for value in T[0, 0, 2].tolist()], T.requires_grad
        ([0.25, 0.5, 1.0], True)
    """
    length, state = recurrence.length, recurrence.state_size
    missing = (1 << (length - 1).bit_length()) - length
    log_decay, b, c = (
        F.pad(tensor.expand(recurrence.batch, recurrence.heads, length, state), (0, 0, 0, missing))[..., None, :]
        for tensor in (recurrence.log_decay, recurrence.b, recurrence.c)
    )
    decay, columns, block = log_decay.exp(), b, 1
    rows = c * decay
    T = (b * c).sum(-1, keepdim=True)  # (batch, heads, blocks, tokens of a block, tokens)
    while block < length:
        (older, newer), (older_rows, newer_rows) = _pairs(columns), _pairs(rows)
        older_decay, newer_decay = _pairs(decay)
        first, last = _pairs(T)
        seen = newer_rows @ older.mT
        T = torch.cat([torch.cat([first, torch.zeros_like(seen)], -1), torch.cat([seen, last], -1)], -2)
        columns = torch.cat([older * newer_decay, newer], -2)
        rows = torch.cat([older_rows, newer_rows * older_decay], -2)
        decay, block = older_decay * newer_decay, 2 * block
    return T[:, :, 0, :length, :length]


def _pairs(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the older and the newer ones of neighboring blocks."""
    return blocks[:, :, 0::2], blocks[:, :, 1::2]
