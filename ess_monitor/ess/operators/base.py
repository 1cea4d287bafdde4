"""Defines the operator: a causal linear map y = T u per sample and head, known by its structure.

T is (L, L) and lower triangular, or (d L, d L) and block lower triangular. All that a layer carries from the tokens
before position i to the tokens from i on passes through H_i = T[i:, :i], so the numerical rank of H_i is the memory in
use: the effective state-size (section 2 of arXiv 2504.19561).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.ess.linalg import index_tensor, result_dtype
from ess_monitor.ess.metrics import tolerance_ess
from ess_monitor.ess.operators.fields import Tokens, all_finite, check_same_device, narrowed, selected
from ess_monitor.ess.positions import check_positions
from ess_monitor.ess.segments import UNKNOWN, longest_places, spans

if TYPE_CHECKING:
    from typing_extensions import Self

    from ess_monitor.ess.realization.state_space import StateSpace


@dataclasses.dataclass(frozen=True, eq=False)
class Operator(ABC):
    """Applies a causal linear map to every (sample, head): T of shape (batch, heads, d L, d L), usually never formed.

    Subclasses are frozen dataclasses whose fields are tensors or plain values. The first two dimensions of every tensor
    are batch and heads, or 1 where the tensor is shared. Every method runs without gradients and without reading device
    values on the host, which only `segments` are.

    Args:
        segments: (batch|1, 1, length), whole numbers, an argument of every class: which segment of its row a token
            belongs to; neighbors with the same number belong together, and -1 is padding. T is 0 in rows and columns of
            padding, and between segments. None: every row is one segment.
    """

    segments: Tensor | None = dataclasses.field(default=None, kw_only=True)

    block_size = 1  # not annotated, so not a field: a constant of every operator but the dense one
    """Rows and columns of T per token, d: 1 unless channels mix inside the operator."""

    @property
    def batch(self) -> int:
        """Number of samples."""
        return max(tensor.shape[0] for tensor in self.tensors)

    @property
    def heads(self) -> int:
        """Number of independent operators per sample: heads, or channels where there are no heads."""
        return max(tensor.shape[1] for tensor in self.tensors)

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens per sequence, L."""

    @property
    @abstractmethod
    def capacity_grows(self) -> bool:
        """True where TSS is not a design choice but grows with the position."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensor fields."""
        return tuple(self._tensor_fields.values())

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tensors[0].device

    @property
    def result_dtype(self) -> torch.dtype:
        """Dtype of results: float64 where a tensor is float64, float32 otherwise."""
        return result_dtype(*(tensor.dtype for tensor in self.tensors))

    @property
    def _tensor_fields(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @torch.no_grad()
    def materialize(self) -> Tensor:
        """Return T: (batch, heads, d L, d L), float64 for float64 inputs and float32 otherwise. For tests and plots."""
        T = self._materialize()
        if self.segments is None:
            return T
        rows, columns = (self.segments.repeat_interleave(size // self.length, 2) for size in T.shape[2:])
        together = (rows[..., :, None] == columns[..., None, :]) & (rows[..., None] >= 0)
        return torch.where(together, T, 0.0)

    def longest_segments(self) -> list[Self]:
        """Return the operator of the longest segment of each row, or of each of them where several are equally long.

        They have no `segments`. Samples whose segments lie at the same tokens are in one operator; rows without a real
        token are in none. Reads `segments` on the host.

        Raises:
            OperatorError: It is not known which tokens of a row are padding.

        Examples:
            >>> from ess_monitor.ess import DenseOperator
            >>> padded = DenseOperator(torch.ones(4, 4).tril(), segments=torch.tensor([[[0, 0, 0, -1]]]))
            >>> [operator.length for operator in padded.longest_segments()]
            [3]
        """
        if self.segments is None:
            return [self]
        return [self._segment(rows, *place) for place, rows in longest_places(self._spans()).items()]

    def without_decay(self) -> Operator | None:
        """Return the operator with every transition matrix A replaced by I. None where there is no A.

        A token at which all decays are exactly 0 begins a new sequence (packed documents): that is not a decay, and
        stays.
        """
        return None

    @torch.no_grad()
    def with_unit_rows(self) -> Operator:
        """Return the operator with the rows of every token divided by their norm: T_i / ||T_i||.

        It is what a layer with a norm behind the mixer applies, whatever the size of q, k, B or C: for values that are
        white, ||T_i|| is the root mean square of the output y_i. With d rows for a token their norm is the root of the
        mean square, ||T[d i : d (i + 1)]||_F / sqrt(d). Rows of zeros stay as they are.

        Examples:
            >>> from ess_monitor.ess import DenseOperator
            >>> DenseOperator(torch.tensor([[0.0, 0.0], [3e-6, 4e-6]])).with_unit_rows().materialize()
            tensor([[[[0.0000, 0.0000],
                      [0.6000, 0.8000]]]], dtype=torch.float64)
        """
        if self.segments is None:
            return self._unit_rows()
        from ess_monitor.ess.operators.dense import DenseOperator  # it is an operator itself

        return DenseOperator(self.materialize(), self.block_size)._unit_rows()

    def finite(self) -> Tensor:
        """Return (batch, heads) bool: False where an input that T depends on is NaN or infinite."""
        flags = (all_finite(tensor) for tensor in self.tensors)
        return reduce(torch.logical_and, flags).expand(self.batch, self.heads)

    def state_capacity(self, positions: Sequence[int]) -> Tensor:
        """Return the theoretically realizable state-size (TSS) per channel at each position: (positions,), floating.

        Raises:
            OperatorError: A position is outside 1..L-1.
        """
        checked = check_positions(positions, self.length)
        if self.segments is None:
            return self._capacities(checked)
        capacity = torch.zeros(len(checked), device=self.device)
        for rows, start, inside, part in self._parts(checked):
            share = len(rows) / self.segments.shape[0]
            capacity[inside] += share * part._capacities([checked[p] - start for p in inside])
        return capacity

    @torch.no_grad()
    def singular_values(self, positions: Sequence[int]) -> Tensor:
        """Return the singular values of H_i at each of `positions`.

        Args:
            positions: Positions i in 1..L-1, in any order.

        Returns:
            (batch, heads, positions, rank), descending and zero-padded to the common rank; float64 for float64 inputs,
            float32 otherwise. NaN for every (sample, head) with a non-finite input, and only there.

        Raises:
            OperatorError: A position is outside 1..L-1.

        Examples:
            >>> from ess_monitor.ess import DenseOperator
            >>> T = torch.tensor([[1.0, 0.0, 0.0], [2.0, 1.0, 0.0], [3.0, 4.0, 1.0]])
            >>> DenseOperator(T).singular_values([2]).round(decimals=4)  # H_2 = [[3, 4]]
            tensor([[[[5.]]]])
        """
        return self._singular_values(positions, self.finite())

    def _singular_values(self, positions: Sequence[int], finite: Tensor, tolerance: float | None = None) -> Tensor:
        """Return `singular_values`, NaN where `finite` (batch, heads) is False.

        With a tolerance they are right to what `gram_spectrum.known_values` says, which takes less time on a CPU.
        """
        checked = check_positions(positions, self.length)
        if not checked:
            return torch.zeros((self.batch, self.heads, 0, 0), dtype=self.result_dtype, device=self.device)
        if self.segments is not None:
            return self._singular_values_of_segments(checked, tolerance)
        values = self._raw_singular_values(checked, tolerance if self.device.type == "cpu" else None)
        return self._existing(values, checked, finite)

    def _values_and_squares(
        self, positions: Sequence[int], finite: Tensor, tolerance: float, position: int, start: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return `_singular_values` and `_row_squares`, without regard to segments."""
        checked = check_positions(positions, self.length)
        if not checked:
            return self._singular_values(checked, finite), self._row_squares(position, start)
        known_to = tolerance if self.device.type == "cpu" else None
        values, squares = self._raw_values_and_squares(checked, known_to, position, start)
        return self._existing(values, checked, finite), squares

    def _existing(self, values: Tensor, positions: Sequence[int], finite: Tensor) -> Tensor:
        # Beyond the smaller side of H_i there is nothing: what a factorization leaves there is rounding.
        side = [self.block_size * min(i, self.length - i) for i in positions]
        exists = torch.arange(values.shape[-1], device=self.device) < index_tensor(side, self.device)[:, None]
        broken = values.isnan().any(-1, keepdim=True) | ~finite[..., None, None]
        return torch.where(exists, values, 0.0).masked_fill(broken, torch.nan).to(self.result_dtype)

    def _tolerance_ess(self, positions: Sequence[int], finite: Tensor, tolerance: float) -> Tensor:
        """Return (batch, heads, positions): how many singular values are above `tolerance`, NaN as above."""
        return tolerance_ess(self._singular_values(positions, finite, tolerance), tolerance)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the operator with `function` applied to every tensor (detach, clone, move).

        Raises:
            OperatorError: `function` is not a function, or its results do not form the operator.
        """
        validation.function("function", function, error=OperatorError)
        changed = {name: function(value) for name, value in self._tensor_fields.items()}
        if self.segments is not None and changed["segments"].is_floating_point():
            changed["segments"] = changed["segments"].long()  # a change of dtype, meant for the others
        return dataclasses.replace(self, **changed)

    def select(
        self,
        *,
        samples: slice | Sequence[int] | None = None,
        heads: slice | Sequence[int] | None = None,
        length: int | None = None,
    ) -> Self:
        """Return the operator of some samples and heads, on the first `length` tokens (exact, because T is causal).

        Evenly spaced selections are views of the same memory.

        Raises:
            OperatorError: A selection is empty, repeats an index or leaves the range.
        """
        if length is not None:
            hint = "the tokens that the operator has"
            length = validation.whole("length", length, 1, self.length, hint=hint, error=OperatorError)
        tokens = None if length is None else slice(0, length)
        return self._narrow(selected("samples", samples, self.batch), selected("heads", heads, self.heads), tokens)

    @abstractmethod
    def _materialize(self) -> Tensor:
        """Return `materialize` without regard to segments; any batch and heads may be 1."""

    @abstractmethod
    def _capacity_at(self, position: int) -> int:
        """Return TSS per channel at a checked position."""

    def _capacities(self, positions: Sequence[int]) -> Tensor:
        """Return `state_capacity` at checked positions, without regard to segments."""
        capacity = [float(self._capacity_at(i)) for i in positions]
        return torch.tensor(capacity, dtype=torch.float32, device="cpu").to(self.device, non_blocking=True)

    @abstractmethod
    def _raw_singular_values(self, positions: Sequence[int], tolerance: float | None = None) -> Tensor:
        """Return (batch, heads, positions, rank) in the working dtype, zero-padded; `tolerance` as above, on a CPU.

        Entries of operators that are not finite may hold anything.
        """

    @abstractmethod
    def _row_squares(self, position: int, start: int) -> tuple[Tensor, Tensor]:
        """Return ||T[start:, :position]||_F^2 and ||T[start:, position:]||_F^2, counted in tokens, position <= start.

        Broadcastable to (batch, heads), in the working dtype. Entries of operators that are not finite may hold
        anything.
        """

    def _raw_values_and_squares(
        self, positions: Sequence[int], tolerance: float | None, position: int, start: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return `_raw_singular_values` and `_row_squares`, from rows that are formed once where both need them."""
        return self._raw_singular_values(positions, tolerance), self._row_squares(position, start)

    def _product_norm(self) -> Tensor | None:
        """Return ||A_L ... A_1||_F in the working dtype, broadcastable to (batch, heads); None where there is no A."""
        return None

    def _mean_diagonal(self) -> Tensor | None:
        """Return the mean of A's diagonal in the working dtype, broadcastable to (batch, heads), or None likewise."""
        return None

    def _state_space(self) -> StateSpace | None:
        """Return the recurrence of a fixed state that T comes from, without regard to segments; None: there is none."""
        return None

    def _stored(self, positions: Sequence[int]) -> Tensor:
        """Return how many inputs the trivial realization stores (B.2.3 of the paper).

        Broadcastable to (batch, heads, positions).
        """
        return index_tensor([self.block_size * i for i in positions], self.device)[None, None]

    @abstractmethod
    def _unit_rows(self) -> Operator:
        """Return `with_unit_rows`, in the working dtype."""

    def _inverse(self, row_squares: Tensor) -> Tensor:
        """Return by what each token's rows are multiplied: (batch, heads, length), from squares that broadcast to it.

        0 for rows of zeros, NaN in operators that are not finite.
        """
        scale = row_squares.rsqrt().masked_fill_(row_squares == 0, 0.0).expand(self.batch, self.heads, self.length)
        return scale.masked_fill(~self.finite()[..., None], torch.nan)

    def _narrow(self, samples: Sequence[int] | None, heads: Sequence[int] | None, tokens: Tokens | None) -> Self:
        """Return the operator of some samples, heads and neighboring tokens, all of them checked."""
        return self.map(lambda tensor: narrowed(tensor, samples, heads, tokens))

    def _check_segments(self) -> None:
        """Raise `OperatorError` unless `segments` have an entry for every token. Call it after all other checks."""
        given: object = self.segments
        if given is None:
            return
        others = [tensor for name, tensor in self._tensor_fields.items() if name != "segments"]
        batch = max(tensor.shape[0] for tensor in others)
        is_whole = isinstance(given, Tensor) and not (given.is_floating_point() or given.is_complex())
        if not (
            isinstance(given, Tensor)
            and is_whole
            and given.dtype != torch.bool
            and given.dim() == 3
            and given.shape[1:] == (1, self.length)
            and (given.shape[0] == 1 or batch in (1, given.shape[0]))
        ):
            raise OperatorError(
                f"segments is {validation.shown(given)}; pass whole numbers of shape (batch|1, 1, {self.length}), one "
                "for every token, or None."
            )
        check_same_device(segments=given, others=others[0])

    def _spans(self) -> list[list[tuple[int, int]]]:
        """Return the segments of each row of `segments`."""
        assert self.segments is not None
        if bool((self.segments == UNKNOWN).any()):
            raise OperatorError(
                "padding is given that cannot be assigned to the tokens of this operator: the mask has another number "
                "of rows or tokens. Give the layer a mask of its own tokens, or leave it out with `layers`."
            )
        return spans(self.segments[:, 0])

    def _segment(self, rows: Sequence[int], start: int, stop: int) -> Self:
        """Return the operator of the tokens of one segment, in some rows of `segments`."""
        assert self.segments is not None
        samples = rows if self.segments.shape[0] > 1 else None
        return dataclasses.replace(self, segments=None)._narrow(samples, None, slice(start, stop))

    def _parts(self, positions: Sequence[int]) -> Iterator[tuple[list[int], int, list[int], Self]]:
        """Yield each segment with positions inside: its rows, its first token, indices of positions, its operator."""
        places: dict[tuple[int, int], list[int]] = {}
        for row, found in enumerate(self._spans()):
            for place in found:
                places.setdefault(place, []).append(row)
        for (start, stop), rows in places.items():
            inside = [p for p, position in enumerate(positions) if start < position < stop]
            if inside:
                yield rows, start, inside, self._segment(rows, start, stop)

    def _singular_values_of_segments(self, positions: Sequence[int], tolerance: float | None) -> Tensor:
        assert self.segments is not None
        rank = self.block_size * max(min(i, self.length - i) for i in positions)
        shape = (self.batch, self.heads, len(positions), rank)
        out = torch.zeros(shape, dtype=self.result_dtype, device=self.device)
        for rows, start, inside, part in self._parts(positions):
            values = part._singular_values([positions[p] - start for p in inside], part.finite(), tolerance)
            samples = rows if self.segments.shape[0] > 1 else list(range(self.batch))
            for row, sample in enumerate(samples):
                out[sample][:, inside, : values.shape[-1]] = values[row if values.shape[0] > 1 else 0]
        largest = max(int((out != 0).any(0).any(0).any(0).sum()), 1)
        return out[..., :largest]


def check_operator(operator: Operator) -> None:
    """Raise `OperatorError` unless `operator` is an `Operator`."""
    hint = "capture_operators(model, ...) gives those of a model"
    validation.instance("operator", operator, Operator, hint=hint, error=OperatorError)
