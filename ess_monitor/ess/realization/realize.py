"""Realizes an operator as a recurrence with the smallest state, or with a smaller one (theorems 2.1 and 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.ess.linalg import SLAB_ELEMENTS, slabs, working_dtype
from ess_monitor.ess.metrics import check_tolerance
from ess_monitor.ess.operators.base import Operator, check_operator
from ess_monitor.ess.operators.fields import check_floating, check_same_device
from ess_monitor.ess.positions import LONGEST
from ess_monitor.ess.realization.balanced import NAMES, Parts, Sizes, realized_by_factors, realized_from_blocks

_OPERATOR_ELEMENTS = 16 * SLAB_ELEMENTS
"""Elements of the factors, or of T, that are held at once."""


@dataclass(frozen=True, eq=False)
class Realization:
    """Holds a recurrence of every (sample, head), with matrices for every token.

    s_{i+1} = A_i s_i + B_i u_i,  y_i = C_i s_i + D_i u_i,  s_0 = 0 (Eq. 1 of the paper). States have a size of their
    own at each position; A, B and C are 0 beyond it. Dimensions of the state are orthogonal for white inputs, and in
    descending order of what they carry: their norms in the outputs to come are the singular values of H_i.

    Entries of operators that are not finite are NaN.
    """

    A: Tensor
    """(batch, heads, length, r, r), where r is the largest size."""
    B: Tensor
    """(batch, heads, length, r, d), d inputs per token."""
    C: Tensor
    """(batch, heads, length, e, r), e outputs per token: d, except in a Jacobian."""
    D: Tensor
    """(batch, heads, length, e, d)."""
    state_sizes: Tensor
    """(batch, heads, length): dimensions of the state before each token, n_i; 0 before the first."""

    @property
    def length(self) -> int:
        """Tokens per sequence, L."""
        return self.A.shape[2]

    @property
    def size(self) -> int:
        """Largest size of a state, r."""
        return self.A.shape[3]

    def truncated(self, size: int) -> Realization:
        """Return the realization with the first `size` dimensions of each state: what `realize(size=...)` gives.

        Raises:
            OperatorError: `size` is negative or not a whole number.
        """
        size = validation.whole("size", size, 0, LONGEST, hint=_SIZE_HINT, error=OperatorError)
        kept = slice(min(size, self.size))
        return replace(
            self,
            A=self.A[..., kept, kept],
            B=self.B[..., kept, :],
            C=self.C[..., kept],
            state_sizes=self.state_sizes.clamp(max=size),
        )

    @torch.no_grad()
    def outputs(self, inputs: Tensor) -> Tensor:
        """Return y = T u, token by token.

        Args:
            inputs: u, (batch|1, heads|1, length, d, channels): channels of a head share its recurrence.

        Returns:
            y, (batch, heads, length, e, channels).

        Raises:
            OperatorError: `inputs` has another shape.
        """
        check_floating("inputs", inputs, "(batch|1, heads|1, length, d, channels)", 5)
        sizes = (self.A.shape[:2], self.length, self.B.shape[4])
        if inputs.shape[2:4] != sizes[1:] or any(
            given not in (1, full) for given, full in zip(inputs.shape, sizes[0], strict=False)
        ):
            batch, heads = sizes[0]
            raise OperatorError(
                f"inputs has shape {tuple(inputs.shape)}, expected ({batch}|1, {heads}|1, {sizes[1]}, {sizes[2]}, "
                "channels)."
            )
        check_same_device(inputs=inputs, realization=self.A)
        inputs = inputs.to(self.A.dtype).expand(*sizes[0], -1, -1, -1)
        state = self.A.new_zeros((*sizes[0], self.size, inputs.shape[4]))
        outputs = []
        for i in range(self.length):
            u = inputs[:, :, i]
            outputs.append(self.C[:, :, i] @ state + self.D[:, :, i] @ u)
            state = self.A[:, :, i] @ state + self.B[:, :, i] @ u
        return torch.stack(outputs, dim=2)

    def materialize(self) -> Tensor:
        """Return the operator of this recurrence: (batch, heads, e L, d L). For tests and plots."""
        columns = self.length * self.B.shape[4]
        units = torch.eye(columns, dtype=self.A.dtype, device=self.A.device)
        return self.outputs(units.reshape(1, 1, self.length, -1, columns)).flatten(2, 3)


_SIZE_HINT = "the state dimensions to keep"


@torch.no_grad()
def realize(operator: Operator, *, size: int | None = None, tolerance: float | None = None) -> Realization:
    """Return a recurrence that computes y = T u with as few state dimensions as possible, or with fewer.

    By default the state before token i has rank(H_i) dimensions, the fewest possible (theorem 2.2), and T is
    reproduced. `size` and `tolerance` truncate it: the directions of H_i with the smallest singular values are left
    out (balanced truncation). The largest singular value of the error is then about the largest that was left out:
    1.0 to 1.5 times it for random operators (`python -m benchmarks.realization`), and never below it.

    The matrices depend on later tokens, as section 2.3 of the paper says: this is a realization of T for one input, and
    not a smaller layer. For inputs that are not known in advance TSS cannot be below `causal_singular_values`' rank.

    Recurrences, delta rules and short filters are realized from their own state at O(L n^3); T is never formed.
    Attention, matrices, long filters and Jacobians need T and an SVD of every H_i, O(L^4): select some tokens first.
    Reads sizes on the host.

    Args:
        operator: What to realize.
        size: Dimensions of the state at most, from 0 up.
        tolerance: Singular values above it are kept, as in `tolerance_ess`: an absolute number from 0 up.

    Raises:
        OperatorError: `operator` is not an operator, `size` is negative, or `size` and `tolerance` are both given.
        ConfigError: `tolerance` is negative or not a number.

    Examples:
        >>> from ess_monitor.ess import DiagonalRecurrence
        >>> memory = DiagonalRecurrence(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 6, 2), torch.ones(1, 1, 6, 2))
        >>> realize(memory).state_sizes  # two state dimensions that hold the same: one is enough
        tensor([[[0., 1., 1., 1., 1., 1.]]])
        >>> torch.allclose(realize(memory).materialize(), memory.materialize(), atol=1e-6)
        True
    """
    check_operator(operator)
    sizes = _sizes(size, tolerance)
    parts: list[list[Parts]] = []
    each = operator.length * _elements_of_a_token(operator)
    for samples in slabs(operator.batch, each * operator.heads * SLAB_ELEMENTS // _OPERATOR_ELEMENTS):
        count = samples.stop - samples.start
        parts.append([])
        for heads in slabs(operator.heads, each * count * SLAB_ELEMENTS // _OPERATOR_ELEMENTS):
            parts[-1].append(_realized(operator.select(samples=samples, heads=heads), sizes))
    return _finished(operator, _joined([_joined(row, 1) for row in parts], 0))


def _sizes(size: int | None, tolerance: float | None) -> Sizes:
    """Return how many singular values of each H_i are kept."""
    if size is not None and tolerance is not None:
        raise OperatorError(f"size={validation.shown(size)} and tolerance are both given; pass one of them, or none.")
    if size is not None:
        most = validation.whole("size", size, 0, LONGEST, hint=_SIZE_HINT, error=OperatorError)
        return lambda values, rounding: (values > rounding).sum(-1).clamp(max=most).to(values.dtype)
    if tolerance is not None:
        tau = check_tolerance(tolerance, "tolerance")
        return lambda values, rounding: (values > rounding.clamp(min=tau)).sum(-1).to(values.dtype)
    return lambda values, rounding: (values > rounding).sum(-1).to(values.dtype)


def _elements_of_a_token(operator: Operator) -> int:
    state = state_of_recurrence(operator)
    return int(operator.length * operator.block_size**2 if state is None else state**2)


def state_of_recurrence(operator: Operator) -> int | None:
    """Return the state size of the recurrence that an operator comes from; None where none is known."""
    recurrence = operator.select(samples=[0], heads=[0])._state_space()
    return None if recurrence is None else recurrence.state


def _realized(operator: Operator, sizes: Sizes) -> Parts:
    recurrence = operator._state_space()
    if recurrence is None:
        T = operator.materialize().to(working_dtype(operator.device))
        return realized_from_blocks(T, operator.length, sizes)
    if operator.segments is not None:
        operator._spans()  # raises where padding cannot be assigned to tokens
        recurrence = recurrence.in_segments(operator.segments)
    return realized_by_factors(recurrence, operator.batch, operator.heads, sizes)


def _joined(parts: Sequence[Parts], dimension: int) -> Parts:
    """Return parts of several operators as one, with zeros up to the largest state."""
    largest = max(part.A.shape[3] for part in parts)

    def padded(part: Parts) -> Parts:
        missing = largest - part.A.shape[3]
        pad = torch.nn.functional.pad
        return replace(
            part,
            A=pad(part.A, (0, missing, 0, missing)),
            B=pad(part.B, (0, 0, 0, missing)),
            C=pad(part.C, (0, missing)),
        )

    each = [padded(part) for part in parts]
    return Parts(*(torch.cat([getattr(part, name) for part in each], dim=dimension) for name in NAMES))


def _finished(operator: Operator, parts: Parts) -> Realization:
    broken = ~operator.finite()

    def result(tensor: Tensor) -> Tensor:
        unknown = broken.reshape(*broken.shape, *(1,) * (tensor.dim() - 2))
        return tensor.masked_fill(unknown, torch.nan).to(operator.result_dtype)

    return Realization(*(result(tensor) for tensor in (parts.A, parts.B, parts.C, parts.D, parts.sizes)))
