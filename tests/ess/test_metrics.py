"""Sizes from singular values, and their aggregation."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from ess_monitor.errors import ConfigError, OperatorError
from ess_monitor.ess import aggregate, entropy_ess, midpoint_index, tolerance_ess
from tests.ess import reference

VALUES = st.lists(st.floats(0, 1e3, allow_subnormal=False), min_size=1, max_size=12)


@given(VALUES, st.floats(0, 10))
def test_tolerance_ess_counts_what_is_strictly_above(values: list[float], tau: float) -> None:
    size = tolerance_ess(torch.tensor([[values]], dtype=torch.float64), tau)
    assert size.item() == sum(value > tau for value in values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-36, 1.0, 1e35])
@given(values=st.lists(st.floats(1e-2, 1e2), min_size=1, max_size=12))
def test_entropy_ess_follows_the_formula_at_every_scale(values: list[float], dtype: torch.dtype, scale: float) -> None:
    tensor = torch.tensor(values, dtype=dtype) * scale
    size = entropy_ess(tensor)
    assert size.dtype == dtype
    assert math.isclose(size.item(), reference.entropy_size(tensor.double()), rel_tol=1e-6)


def test_a_sum_that_overflows_does_not_spoil_the_entropy() -> None:
    assert entropy_ess(torch.full((4,), 1e308, dtype=torch.float64)).item() == pytest.approx(4)
    assert entropy_ess(torch.full((4,), 3e38)).item() == pytest.approx(4)


def test_zeros_and_nothing_have_size_zero() -> None:
    for values in (torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 0)):
        assert torch.equal(tolerance_ess(values), torch.zeros(2, 3, 4))
        assert torch.equal(entropy_ess(values), torch.zeros(2, 3, 4))
    assert tolerance_ess(torch.zeros(5), 0.0) == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_give_nan_and_leave_the_others(bad: float) -> None:
    values = torch.tensor([[bad, 1.0], [2.0, 2.0]])
    assert tolerance_ess(values).isnan().tolist() == [True, False]
    assert entropy_ess(values).isnan().tolist() == [True, False]


@pytest.mark.parametrize("tau", [-1e-3, math.nan, math.inf])
def test_a_tolerance_that_is_none_is_refused(tau: float) -> None:
    with pytest.raises(ConfigError, match=r"tau=.* must be a finite number from 0 up"):
        tolerance_ess(torch.ones(3), tau)


ESS = torch.tensor([[[2.0, 4.0], [1.0, 3.0]], [[5.0, 5.0], [0.0, 8.0]]])  # (sample, head, position)


def test_the_average_is_over_samples_heads_and_positions() -> None:
    assert aggregate(ESS).item() == ESS.mean().item() == 3.5


def test_the_total_sums_over_the_channels_of_a_head_and_over_heads() -> None:
    assert aggregate(ESS, "total").item() == 7.0
    assert aggregate(ESS, "total", channels_per_head=16).item() == 112.0


def test_the_minimum_is_over_samples_and_heads() -> None:
    assert aggregate(ESS, "minimum", position=1).item() == 3.0
    assert aggregate(ESS, "minimum").item() == 1.5


def test_one_position_can_be_picked_in_every_aggregation() -> None:
    assert aggregate(ESS, position=0).item() == 2.0
    assert aggregate(ESS, "total", position=1).item() == 10.0


@pytest.mark.parametrize("over", ["average", "total", "minimum"])
def test_a_nan_reaches_every_aggregate_that_contains_it(over: str) -> None:
    ess = ESS.clone()
    ess[0, 0, 0] = torch.nan
    assert aggregate(ess, over).isnan()  # type: ignore[arg-type]
    assert aggregate(ess, over, position=1).isfinite()  # type: ignore[arg-type]


def test_an_aggregation_of_another_name_or_shape_is_refused() -> None:
    with pytest.raises(OperatorError, match="over='median' must be one of average, total, minimum"):
        aggregate(ESS, "median")  # type: ignore[arg-type]
    with pytest.raises(OperatorError, match=r"ess has shape \(2, 2\)"):
        aggregate(ESS[0])


def test_the_middle_is_the_position_nearest_to_half_the_length() -> None:
    assert midpoint_index([1, 9, 17, 30], 32) == 2
    assert midpoint_index([5], 32) == 0
    with pytest.raises(OperatorError, match="positions is empty"):
        midpoint_index([], 1)
