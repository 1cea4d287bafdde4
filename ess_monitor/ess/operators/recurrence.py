"""Defines recurrences with a diagonal transition matrix: LA, WLA, GLA, S4D, S6, Mamba, RetNet, RG-LRU."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from ess_monitor.errors import OperatorError
from ess_monitor.ess.gram_spectrum import known_or_exact_values, recurrence_counts
from ess_monitor.ess.gramian import Diagonal, recurrence_cores, recurrence_singular_values
from ess_monitor.ess.linalg import result_dtype, slabs, working_dtype
from ess_monitor.ess.operators.base import Operator
from ess_monitor.ess.operators.fields import all_finite, check_batch_and_heads, check_floating, check_same_device
from ess_monitor.ess.positions import check_positions
from ess_monitor.ess.realization.state_space import StateSpace, diagonal
from ess_monitor.ess.row_squares import Windows, diagonal_windows, row_squares, split_row_squares

VECTOR_SHAPE = "(batch, heads, length, state)"


def resets(log_decay: Tensor) -> Tensor:
    """Return the log decay of A := I, (batch|1, heads|1, length|1, 1): 0, and -inf at tokens where all decays are 0.

    A decay that is the same at every token separates no sequences.
    """
    if log_decay.shape[2] == 1:
        return log_decay.new_zeros((*log_decay.shape[:2], 1, 1))
    nothing_kept = log_decay.isneginf().all(-1, keepdim=True)
    return torch.zeros_like(log_decay[..., :1]).masked_fill_(nothing_kept, -torch.inf)


@dataclass(frozen=True, eq=False)
class Recurrence(Operator):
    """Carries a state of fixed size from token to token through transition matrices A_t. TSS is the state size n."""

    log_decay: Tensor

    @property
    @abstractmethod
    def _vectors(self) -> dict[str, Tensor]:
        """The fields with an entry for every token and state dimension, by name."""

    @abstractmethod
    def _product_norm(self) -> Tensor:
        """Return the Frobenius norm of A_L ... A_1 in the working dtype, broadcastable to (batch, heads)."""

    @abstractmethod
    def _mean_diagonal(self) -> Tensor:
        """Return the mean of A's diagonal in the working dtype, broadcastable to (batch, heads)."""

    @abstractmethod
    def without_decay(self) -> Recurrence:
        """Return the operator with A := I, as in `Operator`."""

    @abstractmethod
    def _unit_rows(self) -> Recurrence: ...

    @abstractmethod
    def _cores(self, positions: Sequence[int]) -> Tensor:
        """Return matrices with the singular values of H_i, (batch, heads, positions, n, n), in the working dtype."""

    def __post_init__(self) -> None:
        vectors = self._vectors
        for name, tensor in {"log_decay": self.log_decay, **vectors}.items():
            check_floating(name, tensor, VECTOR_SHAPE, 4)
        given = {name: tensor for name, tensor in self._tensor_fields.items() if name != "segments"}
        check_same_device(**given)
        full_name, full = next(iter(vectors.items()))
        for name, tensor in given.items():
            if name in vectors and tensor.shape[2:] != full.shape[2:]:
                raise OperatorError(
                    f"{name} has shape {tuple(tensor.shape)} and {full_name} {tuple(full.shape)}; both must be "
                    f"{VECTOR_SHAPE} with the same length and state."
                )
            for dimension, size in enumerate(tensor.shape[2:], start=2):
                if size not in (1, full.shape[dimension]):
                    raise OperatorError(
                        f"{name} has shape {tuple(tensor.shape)}, which does not broadcast to {full_name}'s "
                        f"{tuple(full.shape)}: dimension {dimension} must be 1 or {full.shape[dimension]}."
                    )
        check_batch_and_heads(**given)
        self._check_segments()

    @property
    def length(self) -> int:
        return next(iter(self._vectors.values())).shape[2]

    @property
    def state_size(self) -> int:
        """State dimensions per channel, n."""
        return next(iter(self._vectors.values())).shape[3]

    @property
    def capacity_grows(self) -> bool:
        return False

    def finite(self) -> Tensor:
        # A log decay of -inf is a decay of 0 and legal.
        decays = all_finite(self.log_decay, allows_minus_infinity=True)
        others = (all_finite(tensor) for name, tensor in self._tensor_fields.items() if name != "log_decay")
        return reduce(torch.logical_and, others, decays).expand(self.batch, self.heads)

    def _capacity_at(self, position: int) -> int:
        return self.state_size


@dataclass(frozen=True, eq=False)
class DiagonalRecurrence(Recurrence):
    """Updates the state, then reads it: s_t = diag(exp(log_decay_t)) s_{t-1} + b_t u_t,  y_t = c_t . s_t.

    T_ij = sum_n c_i[n] exp(log_decay_{j+1}[n] + ... + log_decay_i[n]) b_j[n] for i >= j. TSS is the state size n.
    Singular values cost O(L n^2 + P n^3) for P positions and never form T (`ess_monitor.ess.gramian`).

    Args:
        log_decay: (batch, heads, length, state), logarithm of A's diagonal; -inf is a decay of exactly 0. Any dimension
            may be 1: state for scalar decay, length for a fixed A. Linear attention: zeros of shape (1, 1, 1, 1).
        b: (batch, heads, length, state), how an input enters the state. batch and heads may be 1.
        c: (batch, heads, length, state), how an output reads it. batch and heads may be 1.

    Raises:
        OperatorError: The shapes do not fit together, or a tensor is complex: `complex_recurrence` takes those.

    Examples:
        >>> memory = DiagonalRecurrence(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 6, 2), torch.ones(1, 1, 6, 2))
        >>> memory.singular_values([3]).round(decimals=4)  # two state dimensions that hold the same thing: rank 1
        tensor([[[[6., 0.]]]])
    """

    b: Tensor
    c: Tensor

    def __post_init__(self) -> None:
        for name, tensor in {"log_decay": self.log_decay, **self._vectors}.items():
            if type(self) is DiagonalRecurrence and isinstance(tensor, Tensor) and tensor.is_complex():
                raise OperatorError(
                    f"{name} has dtype {tensor.dtype}, and DiagonalRecurrence takes real tensors; for complex states "
                    "with y_t = Re(c_t . s_t) use ess_monitor.ess.complex_recurrence(log_decay, b, c), or (log_decay, "
                    "b, 2 * c) where one state of each conjugate pair is kept, as in S4D."
                )
        super().__post_init__()

    @property
    def _vectors(self) -> dict[str, Tensor]:
        return {"b": self.b, "c": self.c}

    def without_decay(self) -> DiagonalRecurrence:
        return DiagonalRecurrence(resets(self.log_decay), self.b, self.c, segments=self.segments)

    @torch.no_grad()
    def _materialize(self) -> Tensor:
        size = (self.batch, self.heads, self.length)
        dtype = working_dtype(self.device)
        decay = self.log_decay.to(dtype).exp().expand(-1, -1, self.length, -1)
        state = torch.zeros((*size, self.state_size), dtype=dtype, device=self.device)
        operator = torch.zeros((*size, self.length), dtype=dtype, device=self.device)
        for i in range(self.length):
            state[:, :, :i] *= decay[:, :, i, None]
            state[:, :, i] = self.b[:, :, i]
            operator[:, :, i, : i + 1] = (state[:, :, : i + 1] * self.c[:, :, i, None].to(dtype)).sum(-1)
        return operator.to(self.result_dtype)

    def _product_norm(self) -> Tensor:
        sums = [part.sum(2, dtype=working_dtype(self.device)) for part in self._decays_in_parts()]
        total = torch.stack(sums).sum(0)
        if self.log_decay.shape[2] == 1:
            total = total * self.length
        repeated = self.state_size // total.shape[-1]
        return (repeated * (2 * total).exp().sum(-1)).sqrt()

    def _mean_diagonal(self) -> Tensor:
        dtype = result_dtype(self.log_decay.dtype)
        parts = (part.to(dtype).exp() for part in self._decays_in_parts())
        sums = [part.sum((2, 3), dtype=working_dtype(self.device)) for part in parts]
        return torch.stack(sums).sum(0) / (self.log_decay.shape[2] * self.log_decay.shape[3])

    def _decays_in_parts(self) -> Iterator[Tensor]:
        """Yield the log decay in parts of 1024 tokens at least: a change of its dtype is then small."""
        samples, heads, tokens, state = self.log_decay.shape
        return (self.log_decay[:, :, part] for part in slabs(tokens, min(samples * heads * state, 1024)))

    def _row_squares(self, position: int, start: int) -> tuple[Tensor, Tensor]:
        longest = max(position, start - position, self.length - start)
        return split_row_squares(self._windows(longest), position, start)

    def _unit_rows(self) -> DiagonalRecurrence:
        return replace(self, c=self.c * self._inverse(row_squares(self._windows(self.length)))[..., None])

    def _windows(self, longest: int, *, present: bool = True) -> Windows:
        fields = (self.log_decay, self.b, self.c)
        return diagonal_windows(*fields, longest, self.batch, self.heads, present=present)

    def _state_space(self) -> StateSpace:
        decay, b, c = self._vectors_of_tokens()
        return StateSpace(diagonal(decay), b, c * decay, (b * c).sum(-1))

    def _vectors_of_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the decays, b and c of every token, (batch|1, heads|1, length, state), in the working dtype."""
        dtype = working_dtype(self.device)
        decay, b, c = (tensor.to(dtype) for tensor in (self.log_decay, self.b, self.c))
        return decay.exp().expand(-1, -1, self.length, self.state_size), b, c

    def _raw_singular_values(self, positions: Sequence[int], tolerance: float | None = None) -> Tensor:
        recurrence = self._updated_first()._diagonal
        if tolerance is None:
            return recurrence_singular_values(recurrence, positions)
        return known_or_exact_values(recurrence, positions, tolerance)

    def _tolerance_ess(self, positions: Sequence[int], finite: Tensor, tolerance: float) -> Tensor:
        if not positions or self.segments is not None or self.device.type != "cpu":
            return super()._tolerance_ess(positions, finite, tolerance)
        checked = check_positions(positions, self.length)
        counts = recurrence_counts(self._updated_first()._diagonal, checked, tolerance)
        return counts.masked_fill(~finite[..., None], torch.nan).to(self.result_dtype)

    @property
    def _diagonal(self) -> Diagonal:
        return Diagonal(self.log_decay, self.b, self.c)

    def _updated_first(self) -> DiagonalRecurrence:
        return self

    def _cores(self, positions: Sequence[int]) -> Tensor:
        return recurrence_cores(self._updated_first()._diagonal, positions)


@dataclass(frozen=True, eq=False)
class ReadFirstRecurrence(DiagonalRecurrence):
    """Reads the state before the update: y_t = c_t . s_{t-1}, then s_t = diag(exp log_decay_t) s_{t-1} + b_t u_t.

    T_ij = sum_n c_i[n] exp(log_decay_{j+1}[n] + ... + log_decay_{i-1}[n]) b_j[n] for i > j, and 0 for i = j: what a
    token adds to its own output is in no H_i. A log decay of -inf separates sequences: the read of that token sees
    nothing from before it either.

    Arguments, A, the state without decay and the cost are those of `DiagonalRecurrence`.
    """

    def _updated_first(self) -> DiagonalRecurrence:
        """Return an operator of the same H_i that reads after the update; the extra decay is divided out of c.

        Decays too strong for that division are bounded. At the bound exp(-283) of a state is left in float64, which
        vanishes in the rounding of any sum.
        """
        dtype = working_dtype(self.device)
        bound = 0.4 * math.log(torch.finfo(dtype).tiny)
        separates = self.log_decay.isneginf()
        log_decay = self.log_decay.to(dtype).masked_fill(separates, 0.0).clamp_min(bound)
        c = self.c.to(dtype) * (-log_decay).exp()
        return DiagonalRecurrence(log_decay.masked_fill(separates, -math.inf), self.b, c)

    @torch.no_grad()
    def _materialize(self) -> Tensor:
        return self._updated_first()._materialize().tril(-1).to(self.result_dtype)

    def _windows(self, longest: int, *, present: bool = False) -> Windows:
        return self._updated_first()._windows(longest, present=present)

    def _state_space(self) -> StateSpace:
        decay, b, c = self._vectors_of_tokens()
        c = c.masked_fill(self.log_decay.isneginf(), 0.0)
        return StateSpace(diagonal(decay), b, c, torch.zeros_like(b * c).sum(-1))
