"""Where H_i is measured, and what that certifies in between."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from ess_monitor.errors import OperatorError
from ess_monitor.ess import DenseOperator, DiagonalRecurrence, Operator, ess_bounds, operator_positions, tolerance_ess


@given(st.integers(1, 400), st.integers(1, 500))
def test_a_number_of_positions_is_spread_evenly(length: int, count: int) -> None:
    positions = operator_positions(length, count)
    assert len(positions) == min(count, length - 1)
    assert all(0 < i < length for i in positions)
    gaps = [right - left for left, right in zip((0, *positions), (*positions, length), strict=True)]
    assert min(gaps) > 0 or length == 1
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("count", [9, 10])
def test_as_many_positions_as_asked_for_up_to_all_but_one(count: int) -> None:
    positions = operator_positions(12, count)
    assert len(set(positions)) == count
    assert set(positions) <= set(range(1, 12))


def test_named_positions() -> None:
    assert operator_positions(9, "midpoint") == (4,)
    assert operator_positions(2, "midpoint") == (1,)
    assert operator_positions(4, "all") == (1, 2, 3)
    assert operator_positions(128, 3) == (32, 64, 96)


@pytest.mark.parametrize("positions", ["midpoint", "all", 8])
def test_one_token_has_no_position(positions: str) -> None:
    assert operator_positions(1, positions) == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(("length", "positions"), [(0, "all"), (8, 0), (8, -1), (8, "end"), (8, True), (8, 2.0)])
def test_positions_that_make_no_sense_are_refused(length: int, positions: object) -> None:
    with pytest.raises(OperatorError, match="must be"):
        operator_positions(length, positions)  # type: ignore[arg-type]


def _operators() -> st.SearchStrategy[Operator]:
    def recurrence(length: int, state: int, strength: float) -> Operator:
        shape = (2, 2, length, state)
        return DiagonalRecurrence(-torch.rand(shape) * strength, torch.randn(shape), torch.randn(shape))

    def dense(length: int, block_size: int) -> Operator:
        rank_deficient = torch.randn(1, 2, length * block_size, 3) @ torch.randn(1, 2, 3, length * block_size)
        return DenseOperator(rank_deficient * torch.rand(()).exp(), block_size)

    length = st.integers(2, 30)
    return st.one_of(
        st.builds(recurrence, length, st.integers(1, 12), st.sampled_from([0.0, 0.5, 4.0])),
        st.builds(dense, length, st.integers(1, 3)),
    )


@given(_operators(), st.data())
def test_bounds_hold_at_every_position_and_are_exact_at_the_sampled_ones(
    operator: Operator, data: st.DataObject
) -> None:
    length, d = operator.length, operator.block_size
    truth = tolerance_ess(operator.singular_values(range(1, length)), tau=0.3)
    positions = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=5)))
    index = torch.tensor(positions, dtype=torch.long) - 1
    capacity = operator.state_capacity(range(1, length)) if isinstance(operator, DiagonalRecurrence) else None
    bounds = ess_bounds(positions, truth[..., index], length, capacity=capacity, block_size=d)
    assert bounds.lower.shape == bounds.upper.shape == truth.shape
    assert (bounds.lower <= truth).all()
    assert (truth <= bounds.upper).all()
    assert torch.equal(bounds.lower[..., index], truth[..., index])
    assert torch.equal(bounds.upper[..., index], truth[..., index])
    assert (bounds.mean_lower <= truth.mean(-1) + 1e-5).all()
    assert (truth.mean(-1) <= bounds.mean_upper + 1e-5).all()
    gap = max(right - left for left, right in zip((0, *positions), (*positions, length), strict=True))
    assert (bounds.upper - bounds.lower <= d * gap).all()
    averaged = ess_bounds(positions, truth[..., index].mean((0, 1)), length, block_size=d)
    assert (averaged.lower <= truth.mean((0, 1)) + 1e-5).all()
    assert (truth.mean((0, 1)) <= averaged.upper + 1e-5).all()


def test_without_samples_the_geometry_and_the_capacity_remain() -> None:
    bounds = ess_bounds((), torch.zeros(2, 0), 6, capacity=2)
    assert bounds.lower.tolist() == [[0.0] * 5] * 2
    assert bounds.upper.tolist() == [[1.0, 2.0, 2.0, 2.0, 1.0]] * 2


def test_all_positions_leave_no_gap() -> None:
    ess = torch.tensor([1.0, 2.0, 2.0, 1.0])
    bounds = ess_bounds((1, 2, 3, 4), ess, 5)
    assert torch.equal(bounds.lower, ess)
    assert torch.equal(bounds.upper, ess)
    assert bounds.mean_lower == bounds.mean_upper == 1.5


def test_one_token_has_empty_bounds() -> None:
    bounds = ess_bounds((), torch.zeros(2, 3, 0), 1)
    assert bounds.lower.shape == bounds.upper.shape == (2, 3, 0)
    assert bounds.mean_lower.isnan().all()


def test_a_nan_stays_with_its_own_operator() -> None:
    bounds = ess_bounds((4,), torch.tensor([[torch.nan], [3.0]]), 8)
    assert bounds.mean_lower.isnan().tolist() == [True, False]
    assert bounds.mean_upper.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("positions", "columns", "message"),
    [((4, 2), 2, "ascending"), ((2, 2), 2, "ascending"), ((2, 9), 2, r"1\.\.7"), ((2, 4), 3, "one entry for each")],
)
def test_positions_that_do_not_fit_are_refused(positions: tuple[int, ...], columns: int, message: str) -> None:
    with pytest.raises(OperatorError, match=message):
        ess_bounds(positions, torch.ones(columns), 8)
