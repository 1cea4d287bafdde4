"""DiagonalRecurrence against the written-out operator."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from ess_monitor.errors import OperatorError
from ess_monitor.ess import DiagonalRecurrence, entropy_ess, linalg, tolerance_ess
from ess_monitor.ess.operators.recurrence import resets
from tests.ess import reference


@st.composite
def recurrences(draw: st.DrawFn) -> DiagonalRecurrence:
    """Any broadcasting of any shape, at scales whose products still fit into float32."""
    size = lambda most: draw(st.integers(1, most))  # noqa: E731
    samples, heads, state = size(2), size(3), draw(st.sampled_from([1, 2, 3, 5, 8, 30]))
    length = draw(st.sampled_from([2, 3, 9, 17, 26]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    maybe = lambda whole: draw(st.sampled_from([1, whole]))  # noqa: E731
    exponent = draw(st.integers(-30, 30))
    shift = draw(st.integers(-4, 4))
    decay_shape = (maybe(samples), maybe(heads), maybe(length), maybe(state))
    log_decay = -torch.rand(decay_shape, dtype=dtype) * draw(st.sampled_from([0.0, 1e-3, 0.3, 5.0, 80.0]))
    b = torch.randn(samples, maybe(heads), length, state, dtype=dtype) * 10.0**exponent
    c = torch.randn(maybe(samples), heads, length, state, dtype=dtype) * 10.0 ** (shift - exponent)
    return DiagonalRecurrence(log_decay, b, c)


def _random(
    *, samples: int = 2, heads: int = 3, length: int = 20, state: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (samples, heads, length, state)
    return -torch.rand(shape, dtype=dtype), torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


@given(recurrences(), st.sampled_from([1e-3, 0.1, 1.0]))
def test_every_position_agrees_with_the_written_out_operator(operator: DiagonalRecurrence, tau: float) -> None:
    T = reference.recurrence(operator.log_decay, operator.b, operator.c)
    magnitudes = reference.recurrence(operator.log_decay, operator.b.abs(), operator.c.abs())
    reference.assert_agrees(operator, T, tau=tau, magnitudes=magnitudes)


@given(recurrences(), st.data())
def test_some_positions_in_any_order_agree_with_the_written_out_operator(
    operator: DiagonalRecurrence, data: st.DataObject
) -> None:
    positions = data.draw(st.lists(st.integers(1, operator.length - 1), min_size=1, max_size=4))
    T = reference.recurrence(operator.log_decay, operator.b, operator.c)
    magnitudes = reference.recurrence(operator.log_decay, operator.b.abs(), operator.c.abs())
    reference.assert_agrees(operator, T, positions=positions, magnitudes=magnitudes)


@given(recurrences())
def test_the_materialized_operator_is_the_written_out_one(operator: DiagonalRecurrence) -> None:
    T = reference.recurrence(operator.log_decay, operator.b, operator.c)
    built = operator.materialize()
    assert built.dtype == operator.b.dtype
    allowed = reference.ERROR[built.dtype] * T.abs().amax((-2, -1), keepdim=True)
    assert ((built.double() - T).abs() <= allowed).all()


@pytest.mark.parametrize("positions", [(150,), (1, 7, 128, 255, 299), tuple(range(1, 300))])
@pytest.mark.parametrize("state", [3, 40])
def test_long_sequences_cut_into_chunks_and_slabs_agree(
    positions: tuple[int, ...], state: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linalg, "SLAB_ELEMENTS", 3000)
    log_decay, b, c = _random(samples=1, heads=2, length=300, state=state)
    log_decay *= 0.05
    T = reference.recurrence(log_decay, b, c)
    reference.assert_agrees(DiagonalRecurrence(log_decay, b, c), T, positions=positions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_lose_nothing_beyond_their_own_rounding(dtype: torch.dtype) -> None:
    log_decay, b, c = (tensor.to(dtype) for tensor in _random())
    operator = DiagonalRecurrence(log_decay, b, c)
    assert operator.singular_values([5]).dtype == torch.float32
    reference.assert_agrees(operator, reference.recurrence(log_decay, b, c))


def test_a_decay_in_another_precision_than_the_features_is_used_as_it_is() -> None:
    log_decay, b, c = _random(dtype=torch.float32)
    operator = DiagonalRecurrence(log_decay, b.bfloat16(), c.bfloat16())
    reference.assert_agrees(operator, reference.recurrence(log_decay, b.bfloat16(), c.bfloat16()))


def test_features_that_require_gradients_are_measured_without_a_graph() -> None:
    log_decay, b, c = (tensor.requires_grad_() for tensor in _random())
    operator = DiagonalRecurrence(log_decay, b, c)
    assert not operator.singular_values([5]).requires_grad
    assert not operator.materialize().requires_grad


def test_a_zero_operator_has_no_memory_of_either_kind() -> None:
    log_decay, b, c = _random()
    operator = DiagonalRecurrence(log_decay, torch.zeros_like(b), c)
    values = operator.singular_values(range(1, 20))
    assert (values == 0).all()
    assert (tolerance_ess(values) == 0).all()
    assert (entropy_ess(values) == 0).all()


def test_a_sequence_of_one_token_has_no_position() -> None:
    operator = DiagonalRecurrence(*_random(length=1))
    assert operator.singular_values([]).shape[:3] == (2, 3, 0)
    assert operator.materialize().shape == (2, 3, 1, 1)


def test_a_sequence_of_two_tokens_has_one_entry() -> None:
    log_decay, b, c = _random(length=2)
    expected = (c[:, :, 1] * log_decay[:, :, 1].exp() * b[:, :, 0]).sum(-1).abs()
    values = DiagonalRecurrence(log_decay, b, c).singular_values([1])
    torch.testing.assert_close(values, expected[..., None, None], rtol=1e-13, atol=0)


def test_strong_decay_over_thousands_of_steps_underflows_to_almost_nothing() -> None:
    length = 5000
    b, c = torch.randn(1, 2, length, 4), torch.randn(1, 2, length, 4)
    operator = DiagonalRecurrence(torch.full((1, 1, 1, 1), -80.0), b, c)
    positions = [1, 2, 1234, 2500, 4999]
    values = operator.singular_values(positions)
    # Everything but the step from i - 1 to i is smaller by another exp(-80).
    index = torch.tensor(positions)
    expected = (c[:, :, index].double() * b[:, :, index - 1].double()).sum(-1).abs() * math.exp(-80)
    torch.testing.assert_close(values[..., 0].double(), expected, rtol=2e-6, atol=0)
    assert (values[..., 1:] < 1e-6 * values[..., :1]).all()
    assert (tolerance_ess(values) == 0).all()


def test_a_short_strong_decay_leaves_the_precision_of_its_neighbors() -> None:
    log_decay, b, c = _random(samples=1, length=150)
    log_decay = torch.where(torch.rand_like(log_decay) < 0.02, -3000.0, -1e-4)
    reference.assert_agrees(DiagonalRecurrence(log_decay, b, c), reference.recurrence(log_decay, b, c))


def test_a_decay_of_exactly_zero_is_legal_and_forgets_everything() -> None:
    log_decay, b, c = _random()
    log_decay[:, :, 8] = -torch.inf
    log_decay[0, 1, 4, 2] = -torch.inf
    operator = DiagonalRecurrence(log_decay, b, c)
    assert operator.finite().all()
    reference.assert_agrees(operator, reference.recurrence(log_decay, b, c))
    assert (operator.singular_values([8]) == 0).all()
    assert (operator.singular_values([7])[..., 0] > 0).all()


def test_a_fixed_decay_of_exactly_zero_leaves_nothing() -> None:
    _, b, c = _random()
    operator = DiagonalRecurrence(torch.full((1, 1, 1, 1), -torch.inf), b, c)
    assert (operator.singular_values(range(1, 20)) == 0).all()


def test_a_growing_state_agrees_too() -> None:
    log_decay, b, c = _random()
    reference.assert_agrees(DiagonalRecurrence(-log_decay, b, c), reference.recurrence(-log_decay, b, c))


def test_growth_beyond_the_range_of_float64_is_nan_and_no_exception() -> None:
    _, b, c = _random()
    operator = DiagonalRecurrence(torch.full((1, 1, 1, 1), 1000.0), b, c)
    assert operator.singular_values([10]).isnan().all()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_rank_of_the_features_bounds_the_size(rank: int) -> None:
    _, b, c = _random(length=30, state=6)
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q[:rank]
    flat = b @ basis.mT @ basis
    values = DiagonalRecurrence(torch.zeros(1, 1, 1, 1), flat, c).singular_values([15])
    assert (tolerance_ess(values) == rank).all()
    reference.assert_agrees(
        DiagonalRecurrence(torch.zeros(1, 1, 1, 1), flat, c), reference.recurrence(torch.zeros(1, 1, 1, 1), flat, c)
    )


def test_a_state_larger_than_the_sequence_is_bounded_by_the_position() -> None:
    log_decay, b, c = _random(length=7, state=50)
    operator = DiagonalRecurrence(log_decay, b, c)
    values = operator.singular_values(range(1, 7))
    assert values.shape[-1] == 3
    assert tolerance_ess(values)[0, 0].tolist() == [1, 2, 3, 3, 2, 1]
    reference.assert_agrees(operator, reference.recurrence(log_decay, b, c))


def test_state_dimensions_of_very_different_scale_agree() -> None:
    log_decay, b, c = _random(state=6)
    scale = 10.0 ** torch.linspace(-60, 60, 6, dtype=torch.float64)
    operator = DiagonalRecurrence(log_decay, b * scale, c / scale)
    reference.assert_agrees(operator, reference.recurrence(log_decay, b * scale, c / scale))


@pytest.mark.parametrize("exponent", [-150, 150])
def test_scales_whose_squares_leave_float64_agree(exponent: int) -> None:
    log_decay, b, c = _random()
    b, c = b * 10.0**exponent, c * 10.0**exponent
    reference.assert_agrees(DiagonalRecurrence(log_decay, b, c), reference.recurrence(log_decay, b, c))


def test_broadcast_decays_equal_the_ones_written_out() -> None:
    _, b, c = _random()
    for shape in [(1, 1, 1, 1), (1, 3, 1, 4), (2, 3, 20, 1), (1, 3, 1, 1), (2, 1, 20, 4)]:
        log_decay = -torch.rand(shape, dtype=torch.float64)
        short = DiagonalRecurrence(log_decay, b, c).singular_values(range(1, 20))
        full = DiagonalRecurrence(log_decay.expand(b.shape).clone(), b, c).singular_values(range(1, 20))
        torch.testing.assert_close(short, full, rtol=1e-12, atol=1e-13)


def test_without_decay_is_the_same_operator_with_the_identity_for_transition() -> None:
    log_decay, b, c = _random()
    undecayed = DiagonalRecurrence(log_decay, b, c).without_decay()
    reference.assert_agrees(undecayed, reference.recurrence(torch.zeros(1, 1, 1, 1), b, c))


def test_without_decay_keeps_samples_and_heads_that_only_the_decay_had() -> None:
    log_decay, b, c = _random()
    undecayed = DiagonalRecurrence(log_decay, b[:1, :1], c[:1, :1]).without_decay()
    assert (undecayed.batch, undecayed.heads) == (2, 3)


def test_the_capacity_is_the_state_size_at_every_position() -> None:
    operator = DiagonalRecurrence(*_random(state=4))
    assert operator.state_capacity([1, 10, 19]).tolist() == [4.0, 4.0, 4.0]
    assert not operator.capacity_grows


@pytest.mark.parametrize(
    ("log_decay", "b", "c", "message"),
    [
        ((1, 1, 1, 1), (1, 2, 8), (1, 2, 8), r"b has shape \(1, 2, 8\), expected \(batch, heads, length, state\)"),
        ((1, 1, 1, 1), (1, 2, 8, 4), (1, 2, 8, 3), "same length and state"),
        ((1, 1, 7, 1), (1, 2, 8, 4), (1, 2, 8, 4), "dimension 2 must be 1 or 8"),
        ((1, 1, 1, 2), (1, 2, 8, 4), (1, 2, 8, 4), "dimension 3 must be 1 or 4"),
        ((1, 3, 1, 1), (1, 2, 8, 4), (1, 2, 8, 4), "has 2 heads, expected 1 or 3"),
        ((1, 1, 1, 1), (2, 2, 8, 4), (3, 2, 8, 4), "has 2 samples, expected 1 or 3"),
        ((1, 1, 1, 1), (1, 2, 0, 4), (1, 2, 0, 4), "no empty dimension"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    log_decay: tuple[int, ...], b: tuple[int, ...], c: tuple[int, ...], message: str
) -> None:
    with pytest.raises(OperatorError, match=message):
        DiagonalRecurrence(torch.zeros(log_decay), torch.zeros(b), torch.zeros(c))


def test_tensors_that_are_not_floating_are_named() -> None:
    ones = torch.ones(1, 1, 4, 2)
    with pytest.raises(OperatorError, match=r"c has dtype torch\.int64"):
        DiagonalRecurrence(torch.zeros(1, 1, 1, 1), ones, ones.long())
    with pytest.raises(OperatorError, match=r"log_decay is 0\.0; pass"):
        DiagonalRecurrence(0.0, ones, ones)  # type: ignore[arg-type]


def test_tensors_on_different_devices_are_named() -> None:
    ones = torch.ones(1, 1, 4, 2)
    with pytest.raises(OperatorError, match="c on meta"):
        DiagonalRecurrence(torch.zeros(1, 1, 1, 1), ones, ones.to("meta"))


@pytest.mark.parametrize("position", [0, 20, -1])
def test_positions_without_a_matrix_are_refused(position: int) -> None:
    with pytest.raises(OperatorError, match=r"must be in 1\.\.19"):
        DiagonalRecurrence(*_random()).singular_values([3, position])


def test_without_decay_packed_sequences_still_do_not_see_each_other() -> None:
    log_decay, b, c = -torch.rand(1, 1, 12, 4), torch.randn(1, 1, 12, 4), torch.randn(1, 1, 12, 4)
    log_decay[:, :, 5] = -torch.inf  # a new sequence
    log_decay[:, :, 8, 0] = -torch.inf  # one state dimension is emptied: that is decay
    operator = DiagonalRecurrence(log_decay, b, c).without_decay().materialize()
    expected = torch.einsum("bhin,bhjn->bhij", c, b).tril()
    expected[:, :, 5:, :5] = 0
    torch.testing.assert_close(operator, expected)


@pytest.mark.parametrize("length", [2, 3])
def test_a_sequence_begins_where_nothing_is_kept_and_never_under_a_decay_that_is_the_same_everywhere(
    length: int,
) -> None:
    fixed = torch.full((1, 2, 1, 4), -math.inf)
    assert torch.equal(resets(fixed), torch.zeros(1, 2, 1, 1))
    packed = torch.zeros(1, 1, length, 4)
    packed[:, :, 1] = -math.inf
    packed[:, :, -1, 0] = -math.inf  # one dimension alone begins nothing
    expected = torch.zeros(1, 1, length, 1)
    expected[:, :, 1] = -math.inf
    assert torch.equal(resets(packed), expected)
