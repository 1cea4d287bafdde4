"""Estimates from shapes alone what the measurement of a layer costs: seconds of one core, and bytes that are held.

The seconds are those of a core of a present server at float64. They are right within a factor of about two; what a
layer really took says by how much they are off on this machine (`ess_monitor.runtime.turns`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ess_monitor.ess.modulation import POSITIONS_OF_A_TOKEN
from ess_monitor.ess.operators.attention import SoftmaxAttention
from ess_monitor.ess.operators.base import Operator
from ess_monitor.ess.operators.convolution import Convolution, GatedConvolution
from ess_monitor.ess.operators.recurrence import Recurrence
from ess_monitor.ess.positions import Positions, operator_positions

_PER_LAYER_SECONDS = 4e-3
"""Of calls alone, whatever the size."""
_SHORTEST = 16
"""Tokens below which a shape is not made shorter."""
_FLOAT_BYTES = 4
_WITHOUT_RETENTION = {"DeltaRecurrence": 0.9, "DiagonalRecurrence": 0.75, "ReadFirstRecurrence": 0.75}
"""Share of the time of a recurrence that is not measured with A := I."""
_JACOBIAN_RANK = 256
"""Most singular values that are looked for (`JacobianOperator.largest`)."""


def state_of(operator: Operator) -> int:
    """Return the size that the cost of an operator depends on beside its length: the `state` of `SampleShape`."""
    if isinstance(operator, Recurrence):
        return operator.state_size
    if isinstance(operator, SoftmaxAttention):
        return operator.q.shape[3]
    if isinstance(operator, (Convolution, GatedConvolution)):
        return operator.kernel.shape[2]
    return operator.block_size


@dataclass(frozen=True)
class SampleShape:
    """Describes what is measured of one layer in one sample.

    Args:
        operator: Class name of the operator.
        state: State dimensions of a recurrence, taps of a convolution, dimensions of an attention head, rows per token
            of a matrix, inputs per token of a Jacobian.
        samples: Sequences.
        heads: Heads or channels of each.
        length: Tokens of each.
        positions: Where H_i is measured, as in `operator_positions`.
        window: Tokens at the end of each sequence among which positions are placed. None: all.
        modulation: Further positions at which ESS is measured, around some tokens of each sequence.
        with_retention: Whether the operator is measured with A := I, too.

    Examples:
        >>> shape = SampleShape("DiagonalRecurrence", state=64, samples=4, heads=4, length=1024, positions=3)
        >>> round(shape.seconds, 1), shape.bytes // 2**20
        (0.2, 12)
        >>> [(each.samples, each.heads, each.length) for each in shape.smaller()][:3]
        [(2, 2, 1024), (1, 1, 1024), (1, 1, 512)]
    """

    operator: str
    state: int
    samples: int
    heads: int
    length: int
    positions: Positions
    window: int | None = None
    modulation: int = 0
    with_retention: bool = True

    @property
    def kind(self) -> str:
        """What shapes have in common whose estimates are off by about the same factor."""
        return f"{self.operator} {self.state}"

    @property
    def seconds(self) -> float:
        """Estimated seconds of one core for everything that is measured."""
        share = 1.0 if self.with_retention else _WITHOUT_RETENTION.get(self.operator, 1.0)
        return _PER_LAYER_SECONDS + share * self.samples * self.heads * self._seconds_of_one()

    @property
    def bytes(self) -> int:
        """Bytes of the copies that are held until they are measured, in single precision."""
        length, state = self.length, self.state
        per_head = {
            "DeltaRecurrence": length * (2 * state + 2),
            "SoftmaxAttention": 2 * length * state,
            "Convolution": state,
            "GatedConvolution": 2 * length + state,
            "DenseOperator": (length * state) ** 2,
            "JacobianOperator": 2 * length * state,
        }.get(self.operator, 3 * length * state)
        return _FLOAT_BYTES * self.samples * self.heads * per_head

    def smaller(self) -> Iterator[SampleShape]:
        """Yield smaller shapes: half of the samples and heads, one of each, then half of the tokens again and again.

        Of the positions around tokens those of one token go first, and all before there are fewer tokens.
        """
        few = replace(self, modulation=min(self.modulation, 2 * POSITIONS_OF_A_TOKEN))
        half = replace(few, samples=max(1, self.samples // 2), heads=max(1, self.heads // 2))
        one = replace(few, samples=1, heads=1)
        alone = replace(one, modulation=0)
        yield from (shape for shape in dict.fromkeys((few, half, one, alone)) if shape != self)
        length = self.length // 2
        while length >= _SHORTEST:
            yield replace(alone, length=length)
            length //= 2

    def _seconds_of_one(self) -> float:
        length, n = self.length, self.state
        count, passes = len(self._places()), 1.5 if self.modulation else 1.0
        at_positions = count * (4e-5 + 1.6e-7 * n**2 + 2e-10 * n**3)
        if self.operator == "DeltaRecurrence":
            return passes * length * (2.6e-7 * n + 1.5e-9 * n**2) + at_positions
        if self.operator == "SoftmaxAttention":
            rows = length if self.window is None else min(length, self.window)
            return 5e-9 * length * rows + self._seconds_of_blocks(length)
        if self.operator in ("Convolution", "GatedConvolution"):
            return 1e-9 * length * min(n, length) + self._seconds_of_blocks(n - 1)
        if self.operator == "DenseOperator":
            return n**3 * self._seconds_of_blocks(length)
        if self.operator == "JacobianOperator":
            products = 2 * min(_JACOBIAN_RANK, 4 * n) + 32
            return count * products * length * (2e-6 + 3e-9 * n**2)
        return (
            passes * length * (7e-8 * n + 6.3e-10 * n**2) + at_positions
        )  # a diagonal recurrence, and whatever is not known

    def _places(self) -> range | list[int]:
        among = self.length if self.window is None else min(self.window, self.length)
        first = self.length - among
        if self.positions == "all" and not self.modulation:
            return range(first + 1, self.length)
        more = [k * among // (self.modulation + 1) for k in range(1, self.modulation + 1)]
        return [first + i for i in (*operator_positions(among, self.positions), *more)]

    def _seconds_of_blocks(self, largest: int) -> float:
        """Return what the singular values of H_i take where there is no small factor; `largest` bounds its sides."""
        sides = ((min(i, largest), min(self.length - i, largest)) for i in self._places())
        return sum(1.5e-10 * min(side) ** 2 * max(side) for side in sides)
