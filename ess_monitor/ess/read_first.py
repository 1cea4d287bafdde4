"""Recurrences whose state is read before it is updated: RWKV-4 and RWKV-6."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ess_monitor.ess.linalg import result_dtype, working_dtype
from ess_monitor.ess.recurrence import DiagonalRecurrence


@dataclass(frozen=True, eq=False)
class ReadFirstRecurrence(DiagonalRecurrence):
    """y_t = c_t . s_{t-1}, then s_t = diag(exp log_decay_t) s_{t-1} + b_t u_t: the state is read before it is updated.

    T_ij = sum_n c_i[n] exp(log_decay_{j+1}[n] + ... + log_decay_{i-1}[n]) b_j[n] for i > j, and 0 for i = j: what a
    token adds to its own output is in no H_i. A log decay of -inf separates sequences: the read of that token sees
    nothing from before it either.

    Arguments as in `DiagonalRecurrence`, and so are A, the state without decay and the cost.
    """

    def _updated_first(self) -> DiagonalRecurrence:
        """The same H_i with the read after the update: the one decay that such a read sees more is divided out.

        Decays too strong for that are bounded. What they then leave of a state, exp(-283) in float64, is as far below
        the rounding of any sum as nothing at all is.
        """
        dtype = working_dtype(self.device)
        bound = 0.4 * math.log(torch.finfo(dtype).tiny)
        separates = self.log_decay.isneginf()
        log_decay = self.log_decay.to(dtype).masked_fill(separates, 0.0).clamp_min(bound)
        c = self.c.to(dtype) * (-log_decay).exp()
        return DiagonalRecurrence(log_decay.masked_fill(separates, -math.inf), self.b, c)

    @torch.no_grad()
    def materialize(self) -> Tensor:
        return self._updated_first().materialize().tril(-1).to(result_dtype(*(t.dtype for t in self.tensors)))

    def _raw_singular_values(self, positions: Sequence[int]) -> Tensor:
        return self._updated_first()._raw_singular_values(positions)
