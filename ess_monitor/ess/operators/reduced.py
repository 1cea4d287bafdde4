"""Keeps of a long recurrence what is measured of it, in a size that does not grow with the length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from ess_monitor.errors import OperatorError
from ess_monitor.ess.linalg import singular_values_
from ess_monitor.ess.operators.base import Operator
from ess_monitor.ess.operators.fields import Tokens, narrowed
from ess_monitor.ess.operators.recurrence import Recurrence

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class ReducedRecurrence(Operator):
    """Holds R_O R_C^T at a few positions, the n x n matrices that have the singular values of H_i = O_i C_i (B.2.2).

    R_C and R_O are triangular factors of C_i^T and O_i, carried through the sequence (`ess_monitor.ess.gramian`), so
    nothing is lost. The tokens are gone: other positions, T and its rows cannot be computed any more.

    Args:
        cores: (batch, heads, positions, n, n).
        undecayed: The same with A := I. None where that is not asked for.
        decay: (batch, heads, 2): the Frobenius norm of A_L ... A_1, and the mean of A's diagonal.
        row_squares: (batch, heads, 2), what `_row_squares` returns at `rows`.
        is_finite: (batch, heads) bool.
        positions: Of the cores, ascending.
        tokens: Tokens per sequence, L.
        rows: Position and first row of `row_squares`. None: there are none.
        has_unit_rows: Whether the cores are of T with unit rows.
    """

    cores: Tensor
    undecayed: Tensor | None
    decay: Tensor
    row_squares: Tensor
    is_finite: Tensor
    positions: tuple[int, ...]
    tokens: int
    rows: tuple[int, int] | None = None
    has_unit_rows: bool = False

    @property
    def length(self) -> int:
        return self.tokens

    @property
    def capacity_grows(self) -> bool:
        return False

    def finite(self) -> Tensor:
        return self.is_finite

    def without_decay(self) -> ReducedRecurrence | None:
        return None if self.undecayed is None else replace(self, cores=self.undecayed, undecayed=None)

    def _capacity_at(self, position: int) -> int:
        return self.cores.shape[-1]

    def _product_norm(self) -> Tensor:
        return self.decay[..., 0]

    def _mean_diagonal(self) -> Tensor:
        return self.decay[..., 1]

    def _raw_singular_values(self, positions: Sequence[int], tolerance: float | None = None) -> Tensor:
        if not set(positions) <= set(self.positions):
            _refuse(f"positions {list(positions)}", self)
        values = singular_values_(self.cores[:, :, [self.positions.index(i) for i in positions]])
        return values[..., : max(min(i, self.length - i) for i in positions)]

    def _row_squares(self, position: int, start: int) -> tuple[Tensor, Tensor]:
        if self.rows != (position, start):
            _refuse(f"rows from {start} on, split at {position},", self)
        far, near = self.row_squares.unbind(-1)
        return far, near

    def _unit_rows(self) -> ReducedRecurrence:
        return self if self.has_unit_rows else _refuse("T with unit rows", self)

    def _materialize(self) -> Tensor:
        _refuse("T", self)

    def _narrow(self, samples: Sequence[int] | None, heads: Sequence[int] | None, tokens: Tokens | None) -> Self:
        if tokens is not None and not (isinstance(tokens, slice) and (tokens.start, tokens.stop) == (0, self.length)):
            _refuse("a part of the tokens", self)
        return self.map(lambda tensor: narrowed(tensor, samples, heads, None))


def _refuse(what: str, operator: ReducedRecurrence) -> NoReturn:
    raise OperatorError(
        f"{what} cannot be computed of a recurrence that was reduced to positions {list(operator.positions)}; capture "
        "it whole, with max_length=None."
    )


@torch.no_grad()
def reduced(
    operator: Recurrence, positions: Sequence[int], *, rows: tuple[int, int] | None = None, unit_rows: bool = False
) -> ReducedRecurrence:
    """Return what is measured of a recurrence at `positions`. Reads no device value on the host.

    Args:
        operator: One without `segments`.
        positions: In 1..L-1, ascending.
        rows: Position and first row at which `far_share` looks. None: nowhere.
        unit_rows: Reduce T with unit rows; the decay and `rows` are still of T itself.

    Examples:
        >>> from ess_monitor.ess import DiagonalRecurrence
        >>> features = torch.eye(3).repeat(1, 1, 40, 1)
        >>> few = reduced(DiagonalRecurrence(torch.zeros(1, 1, 1, 1), features, features), [60])
        >>> few.cores.shape, [round(value, 6) for value in few.singular_values([60])[0, 0, 0].tolist()]
        (torch.Size([1, 1, 1, 3, 3]), [20.0, 20.0, 20.0])
    """
    both = [operator, operator.without_decay()]
    cores, undecayed = ((each._unit_rows() if unit_rows else each)._cores(positions) for each in both)
    shape = (operator.batch, operator.heads)
    decay = [value.expand(shape) for value in (operator._product_norm(), operator._mean_diagonal())]
    squares = [cores.new_zeros(shape)] * 2
    if rows is not None:
        squares = [value.expand(shape) for value in operator._row_squares(*rows)]
    return ReducedRecurrence(
        cores,
        undecayed,
        torch.stack(decay, -1),
        torch.stack(squares, -1),
        operator.finite().clone(),
        tuple(positions),
        operator.length,
        rows,
        unit_rows,
    )
