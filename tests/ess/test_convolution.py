"""Convolution and GatedConvolution against the written-out operator."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from ess_monitor.errors import OperatorError
from ess_monitor.ess import Convolution, GatedConvolution, linalg, tolerance_ess
from tests.ess import reference

SIZES = st.sampled_from([1, 2, 3, 4, 9, 20])


@given(SIZES, SIZES, st.sampled_from([torch.float32, torch.float64]), st.sampled_from([1e-30, 1.0, 1e30]))
def test_plain_filters_agree_with_the_written_out_operator(
    taps: int, length: int, dtype: torch.dtype, scale: float
) -> None:
    kernel = torch.randn(1, 3, taps, dtype=dtype) * scale
    operator = Convolution(kernel, length)
    T = reference.convolution(kernel, length)
    torch.testing.assert_close(operator.materialize().double(), T, rtol=0, atol=0)
    reference.assert_agrees(operator, T)


@given(SIZES, SIZES, st.sampled_from([torch.float32, torch.float64]), st.integers(0, 5))
def test_gated_filters_agree_with_the_written_out_operator(
    taps: int, length: int, dtype: torch.dtype, shared: int
) -> None:
    def gate(wide: bool) -> torch.Tensor:
        return torch.randn(2, 3 if wide else 1, length, dtype=dtype)

    kernel = torch.randn(1, 3 if shared else 1, taps, dtype=dtype)
    b, c = gate(shared != 1), gate(shared != 2)
    operator = GatedConvolution(b, kernel, c)
    T = reference.convolution(kernel, length, b, c)
    torch.testing.assert_close(operator.materialize().double(), T)
    reference.assert_agrees(operator, T)


def test_work_cut_into_small_slabs_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "SLAB_ELEMENTS", 20)
    kernel, b, c = torch.randn(1, 3, 4).double(), torch.randn(2, 3, 20).double(), torch.randn(2, 3, 20).double()
    reference.assert_agrees(GatedConvolution(b, kernel, c), reference.convolution(kernel, 20, b, c))
    reference.assert_agrees(Convolution(kernel, 20), reference.convolution(kernel, 20))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_lose_nothing_beyond_their_own_rounding(dtype: torch.dtype) -> None:
    kernel, b, c = (torch.randn(shape).to(dtype) for shape in [(1, 3, 4), (2, 3, 12), (2, 3, 12)])
    operator = GatedConvolution(b, kernel, c)
    assert operator.singular_values([5]).dtype == torch.float32
    reference.assert_agrees(operator, reference.convolution(kernel, 12, b, c))


def test_a_short_filter_remembers_one_token_less_than_it_has_taps() -> None:
    operator = Convolution(torch.randn(1, 5, 4), 100)
    values = operator.singular_values([1, 2, 50, 99])
    assert values.shape == (1, 5, 4, 3)
    assert operator.state_capacity([1, 2, 50, 99]).tolist() == [1.0, 2.0, 3.0, 3.0]
    assert (tolerance_ess(values, 1e-6)[..., 2] == 3).all()
    assert not operator.capacity_grows
    assert operator.without_decay() is None


def test_a_filter_as_long_as_the_sequence_has_a_growing_capacity() -> None:
    operator = Convolution(torch.randn(1, 1, 16))
    assert operator.length == 16
    assert operator.capacity_grows
    assert operator.state_capacity([3, 15]).tolist() == [3.0, 15.0]


def test_a_decaying_exponential_is_a_recurrence_of_one_state() -> None:
    kernel = 0.9 ** torch.arange(64, dtype=torch.float64)
    assert tolerance_ess(Convolution(kernel[None, None]).singular_values([32])).item() == 1


def test_a_filter_without_a_past_has_no_memory() -> None:
    values = GatedConvolution(torch.ones(1, 1, 6), torch.ones(1, 1, 1), torch.ones(1, 1, 6)).singular_values([1, 3])
    assert tolerance_ess(values).tolist() == [[[0.0, 0.0]]]


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(OperatorError, match=r"kernel has shape \(4,\), expected \(batch, heads, taps\)"):
        Convolution(torch.ones(4))
    with pytest.raises(OperatorError, match="length=-1 must be a whole number from 0 to"):
        Convolution(torch.ones(1, 1, 4), length=-1)
    with pytest.raises(OperatorError, match="b has length 5 and c 6"):
        GatedConvolution(torch.ones(1, 1, 5), torch.ones(1, 1, 4), torch.ones(1, 1, 6))
    with pytest.raises(OperatorError, match="kernel has 2 heads, expected 1 or 3"):
        GatedConvolution(torch.ones(1, 3, 5), torch.ones(1, 2, 4), torch.ones(1, 3, 5))
