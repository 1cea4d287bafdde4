"""What a sample costs, estimated from shapes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from ess_monitor import ess
from ess_monitor.ess.cost import SampleShape, state_of

KINDS = ("DiagonalRecurrence", "DeltaRecurrence", "SoftmaxAttention", "GatedConvolution", "JacobianOperator")
FULL = SampleShape("DiagonalRecurrence", state=64, samples=4, heads=4, length=1024, positions=3)


def shape(kind: str, **changes: int) -> SampleShape:
    return SampleShape(**{**vars(FULL), "operator": kind, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_smaller_shapes_cost_less_and_end_with_one_operator_on_a_few_tokens(kind: str) -> None:
    ladder = [shape(kind), *shape(kind).smaller()]
    assert all(later.seconds < earlier.seconds for earlier, later in pairwise(ladder))
    assert all(later.bytes <= earlier.bytes for earlier, later in pairwise(ladder))
    assert (ladder[-1].samples, ladder[-1].heads, ladder[-1].length) == (1, 1, 16)
    assert {each.positions for each in ladder} == {3}


@pytest.mark.parametrize(
    ("kind", "growth"), [("DiagonalRecurrence", 1), ("DeltaRecurrence", 1), ("SoftmaxAttention", 3)]
)
def test_the_estimate_grows_with_the_length_as_the_algorithms_do(kind: str, growth: int) -> None:
    short, long = shape(kind, length=2**14).seconds, shape(kind, length=2**15).seconds
    assert long / short == pytest.approx(2**growth, rel=0.1)


def test_bytes_are_those_of_the_tensors() -> None:
    def random(*size: int) -> torch.Tensor:
        return torch.randn(size)

    operators = (
        ess.DiagonalRecurrence(random(2, 3, 40, 8), random(2, 3, 40, 8), random(2, 3, 40, 8)),
        ess.DeltaRecurrence(random(2, 3, 40, 1), random(2, 3, 40), random(2, 3, 40, 8), random(2, 3, 40, 8)),
        ess.SoftmaxAttention(random(2, 3, 40, 8), random(2, 3, 40, 8)),
        ess.GatedConvolution(random(2, 3, 40), random(2, 3, 8), random(2, 3, 40)),
        ess.DenseOperator(random(2, 3, 80, 80), block_size=2),
    )
    for operator in operators:
        estimated = SampleShape(type(operator).__name__, state_of(operator), 2, 3, 40, "midpoint").bytes
        assert estimated == sum(tensor.numel() * tensor.element_size() for tensor in operator.tensors)


def test_positions_around_tokens_are_paid_for_and_go_before_tokens_do() -> None:
    plain = replace(FULL, operator="SoftmaxAttention")
    for shape in (FULL, plain):
        assert replace(shape, modulation=20).seconds > replace(shape, modulation=10).seconds > shape.seconds
    sizes = [(each.modulation, each.samples, each.length) for each in replace(plain, modulation=20).smaller()]
    assert sizes[:5] == [(10, 4, 1024), (10, 2, 1024), (10, 1, 1024), (0, 1, 1024), (0, 1, 512)]
    assert [*replace(plain, modulation=20).smaller()][-1] == [*plain.smaller()][-1]
