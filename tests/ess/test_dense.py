"""DenseOperator: the operator as it is given."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from ess_monitor.errors import OperatorError
from ess_monitor.ess import DenseOperator, linalg, tolerance_ess
from tests.ess import reference


@given(
    st.sampled_from([2, 3, 8, 13]),
    st.integers(1, 3),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_every_block_size_agrees_with_the_svd(length: int, block_size: int, dtype: torch.dtype, scale: float) -> None:
    T = torch.randn(2, 2, length * block_size, length * block_size, dtype=dtype) * scale
    reference.assert_agrees(DenseOperator(T, block_size), T.double())


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_missing_leading_dimensions_are_one(leading: tuple[int, ...]) -> None:
    T = torch.randn(*leading, 8, 8)
    operator = DenseOperator(T, 2)
    full = (1, 1, *leading)[-2:]
    assert (operator.batch, operator.heads, operator.length) == (*full, 4)
    assert operator.materialize().shape == (*full, 8, 8)


def test_nothing_above_the_diagonal_is_read() -> None:
    T = torch.randn(1, 2, 6, 6)
    above = torch.full_like(T, torch.nan).triu(1) + T.tril()
    assert DenseOperator(above).finite().all()
    expected = DenseOperator(T.tril()).singular_values(range(1, 6))
    assert torch.equal(DenseOperator(above).singular_values(range(1, 6)), expected)


def test_work_cut_into_small_slabs_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "SLAB_ELEMENTS", 20)
    T = torch.randn(2, 3, 10, 10).double()
    reference.assert_agrees(DenseOperator(T), T)


def test_the_operator_is_not_changed() -> None:
    T = torch.randn(1, 1, 6, 6)
    T[0, 0, 4, 1] = torch.inf
    before = T.clone()
    DenseOperator(T).singular_values([3])
    assert torch.equal(T, before)


def test_the_capacity_is_that_of_the_trivial_realization() -> None:
    operator = DenseOperator(torch.eye(12), 3)
    assert operator.state_capacity([1, 3]).tolist() == [3.0, 9.0]
    assert operator.capacity_grows
    assert operator.without_decay() is None
    assert (tolerance_ess(operator.singular_values([1, 2, 3])) == 0).all()


@pytest.mark.parametrize(
    ("shape", "block_size", "message"),
    [
        ((6, 5), 1, "must be square"),
        ((6, 6), 4, "a divisor"),
        ((6, 6), 0, "from 1 up"),
        ((6,), 1, "expected"),
        ((0, 0), 1, "no empty dimension"),
    ],
)
def test_matrices_that_are_no_operator_are_named(shape: tuple[int, ...], block_size: int, message: str) -> None:
    with pytest.raises(OperatorError, match=message):
        DenseOperator(torch.zeros(shape), block_size)


def test_a_selection_keeps_the_blocks() -> None:
    operator = DenseOperator(torch.randn(2, 2, 8, 8).tril(), block_size=2)
    assert operator.select(samples=slice(0, 1), heads=(0,), length=4).block_size == 2
