"""An operator that is not formed yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ess_monitor.ess import Operator


@dataclass(frozen=True)
class Sketch:
    """What a layer applied, before the few samples and heads that are wanted have been cut out.

    For layers whose A is computed from smaller tensors (Mamba: log A = Delta A, of state size times the numbers of
    Delta): A is formed for the part that is taken only.
    """

    batch: int
    heads: int
    length: int
    form: Callable[[slice, Sequence[int], int], Operator]
    """`(samples, heads, length) -> Operator` of that part."""

    def select(self, *, samples: slice, heads: Sequence[int], length: int) -> Operator:
        """The operator of some samples and heads, on the first `length` tokens."""
        return self.form(samples, heads, length)
