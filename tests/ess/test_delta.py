"""DeltaRecurrence against the operator written out with a matrix for every transition."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ess_monitor.errors import OperatorError
from ess_monitor.ess import (
    DeltaRecurrence,
    DiagonalRecurrence,
    decay_product_norm,
    entropy_ess,
    linalg,
    mean_decay,
    retention,
    tolerance_ess,
)
from tests.ess import reference

NO_DECAY = torch.zeros(1, 1, 1, 1, dtype=torch.float64)


def _transitions(operator: DeltaRecurrence) -> Tensor:
    if operator.left is None or operator.right is None:
        return reference.delta_rule(operator.log_decay, operator.beta, operator.k)
    return reference.diagonal_plus_rank_one(operator.log_decay, operator.left, operator.right)


def _written_out(operator: DeltaRecurrence) -> Tensor:
    entering = operator.beta.double()[..., None] * operator.k.double()
    return reference.matrix_recurrence(_transitions(operator), entering, operator.q)


@st.composite
def delta_recurrences(draw: st.DrawFn) -> DeltaRecurrence:
    """Both forms, any broadcasting, at scales whose products still fit into float32."""
    size = lambda most: draw(st.integers(1, most))  # noqa: E731
    samples, heads, state = size(2), size(3), draw(st.sampled_from([1, 2, 3, 5, 8, 30]))
    length = draw(st.sampled_from([2, 3, 9, 17, 26]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    maybe = lambda whole: draw(st.sampled_from([1, whole]))  # noqa: E731
    decay_shape = (maybe(samples), maybe(heads), maybe(length), maybe(state))
    log_decay = -torch.rand(decay_shape, dtype=dtype) * draw(st.sampled_from([0.0, 1e-3, 0.3, 5.0, 80.0]))
    if draw(st.booleans()):
        log_decay = log_decay.masked_fill(torch.rand_like(log_decay) < 0.1, -torch.inf)
    keys = normalize(torch.randn(maybe(samples), heads, length, state, dtype=dtype), dim=-1)
    q = torch.randn(samples, maybe(heads), length, state, dtype=dtype) * 10.0 ** draw(st.integers(-30, 30))
    if draw(st.booleans()):
        beta = torch.rand(maybe(samples), maybe(heads), maybe(length), dtype=dtype) * draw(st.sampled_from([1.0, 2.0]))
        return DeltaRecurrence(log_decay, beta, keys, q)
    left = keys * torch.rand(maybe(samples), maybe(heads), length, state, dtype=dtype)
    b = torch.randn(maybe(samples), heads, length, state, dtype=dtype)
    return DeltaRecurrence.diagonal_plus_rank_one(log_decay, left, -keys, b, q)


def _random(
    *, samples: int = 2, heads: int = 3, length: int = 20, state: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (samples, heads, length, state)
    keys = normalize(torch.randn(shape, dtype=dtype), dim=-1)
    return -torch.rand(shape, dtype=dtype), torch.rand(shape[:3], dtype=dtype), keys, torch.randn(shape, dtype=dtype)


@given(delta_recurrences(), st.sampled_from([1e-3, 0.1, 1.0]))
def test_every_position_agrees_with_the_written_out_operator(operator: DeltaRecurrence, tau: float) -> None:
    reference.assert_agrees(operator, _written_out(operator), tau=tau)


@given(delta_recurrences(), st.data())
def test_some_positions_in_any_order_agree_with_the_written_out_operator(
    operator: DeltaRecurrence, data: st.DataObject
) -> None:
    positions = data.draw(st.lists(st.integers(1, operator.length - 1), min_size=1, max_size=4))
    reference.assert_agrees(operator, _written_out(operator), positions=positions)


@given(delta_recurrences())
def test_the_materialized_operator_is_the_written_out_one(operator: DeltaRecurrence) -> None:
    T = _written_out(operator)
    built = operator.materialize()
    assert built.dtype == operator.k.dtype
    allowed = reference.ERROR[built.dtype] * T.abs().amax((-2, -1), keepdim=True)
    assert ((built.double() - T).abs() <= allowed).all()


@pytest.mark.parametrize("positions", [(150,), (1, 7, 128, 255, 299), tuple(range(1, 300))])
@pytest.mark.parametrize("state", [3, 40])
@pytest.mark.parametrize("largest_beta", [1.0, 2.0])
def test_long_sequences_cut_into_chunks_and_slabs_agree(
    positions: tuple[int, ...], state: int, largest_beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linalg, "SLAB_ELEMENTS", 20_000)
    log_decay, beta, k, q = _random(samples=1, heads=2, length=300, state=state)
    operator = DeltaRecurrence(0.01 * log_decay, largest_beta * beta, k, q)
    reference.assert_agrees(operator, _written_out(operator), positions=positions)


@pytest.mark.parametrize("length", [37, 200])
def test_windows_that_are_joined_from_parts_agree(length: int) -> None:
    """A state of 80 makes windows of 40 tokens, in four parts; those that end at a position are of any size."""
    log_decay, beta, k, q = _random(samples=1, heads=1, length=length, state=80)
    operator = DeltaRecurrence(0.01 * log_decay, 2 * beta, k, q)
    reference.assert_agrees(operator, _written_out(operator), positions=(1, length // 2, length - 3))


def test_the_two_forms_agree_where_they_say_the_same() -> None:
    log_decay, beta, k, q = _random()
    entering = beta[..., None] * k
    written = DeltaRecurrence.diagonal_plus_rank_one(log_decay, -entering, log_decay.exp() * k, entering, q)
    values = DeltaRecurrence(log_decay, beta, k, q).singular_values(range(1, 20))
    torch.testing.assert_close(written.singular_values(range(1, 20)), values, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 20, 1), (1, 3, 1, 4), (2, 3, 20, 4)])
def test_a_rank_one_part_of_zero_leaves_the_diagonal_recurrence(shape: tuple[int, ...]) -> None:
    log_decay = -torch.rand(shape, dtype=torch.float64)
    _, _, b, c = _random()
    diagonal = DiagonalRecurrence(log_decay, b, c)
    operator = DeltaRecurrence.diagonal_plus_rank_one(log_decay, torch.zeros_like(b), torch.randn_like(b), b, c)
    positions = range(1, 20)
    torch.testing.assert_close(
        operator.singular_values(positions), diagonal.singular_values(positions), rtol=1e-12, atol=1e-13
    )
    torch.testing.assert_close(decay_product_norm(operator), decay_product_norm(diagonal))
    torch.testing.assert_close(mean_decay(operator), mean_decay(diagonal))


@pytest.mark.parametrize("nothing", ["beta", "k"])
def test_tokens_that_write_nothing_leave_no_memory(nothing: str) -> None:
    log_decay, beta, k, q = _random()
    fields = {"beta": beta, "k": k}
    fields[nothing] = torch.zeros_like(fields[nothing])
    operator = DeltaRecurrence(log_decay, q=q, **fields)
    values = operator.singular_values(range(1, 20))
    assert (values == 0).all()
    assert (tolerance_ess(values) == 0).all()
    assert (entropy_ess(values) == 0).all()


def test_tokens_that_write_nothing_erase_nothing_either() -> None:
    _, beta, k, q = _random()
    beta[:, :, 5:15] = 0.0
    reads_late = torch.zeros_like(q)
    reads_late[:, :, 15:] = q[:, :, 15:]
    operator = DeltaRecurrence(NO_DECAY, beta, k, reads_late)
    values = operator.singular_values(range(5, 16))
    torch.testing.assert_close(values, values[:, :, :1].expand_as(values), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("distinct", [1, 2, 4])
def test_memory_is_one_dimension_for_each_orthogonal_key_in_use(distinct: int) -> None:
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    which = torch.arange(40) % distinct
    k = basis[which][None, None]
    q = torch.randn(1, 1, 40, 6, dtype=torch.float64)
    operator = DeltaRecurrence(NO_DECAY, torch.ones(1, 1, 1).double(), k, q)
    # The token at the position overwrites what is held at its own key, before anything is read.
    ess = tolerance_ess(operator.singular_values([4, 20, 35]))
    assert (ess == distinct - 1).all()
    writes = torch.ones(1, 1, 40, dtype=torch.float64)
    writes[:, :, 20:] = 0.0
    kept = DeltaRecurrence(NO_DECAY, writes, k, q)
    assert (tolerance_ess(kept.singular_values([20])) == distinct).all()


def test_reflections_forget_nothing() -> None:
    _, _, k, q = _random(length=45)
    operator = DeltaRecurrence(NO_DECAY, torch.full((1, 1, 1), 2.0).double(), k, q)
    torch.testing.assert_close(decay_product_norm(operator), torch.full((2, 3), 2.0).double())
    torch.testing.assert_close(mean_decay(operator), torch.full((2, 3), 0.5).double())
    assert (tolerance_ess(operator.singular_values([22])) == 4).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_lose_nothing_beyond_their_own_rounding(dtype: torch.dtype) -> None:
    operator = DeltaRecurrence(*(tensor.to(dtype) for tensor in _random()))
    assert operator.singular_values([5]).dtype == torch.float32
    reference.assert_agrees(operator, _written_out(operator))
    undecayed = operator.without_decay()
    entering = operator.beta.double()[..., None] * operator.k.double()
    reference.assert_agrees(undecayed, reference.recurrence(NO_DECAY, entering, operator.q))


def test_a_decay_of_exactly_zero_forgets_everything() -> None:
    log_decay, beta, k, q = _random()
    log_decay[:, :, 8] = -torch.inf
    log_decay[0, 1, 4, 2] = -torch.inf
    operator = DeltaRecurrence(log_decay, beta, k, q)
    assert operator.finite().all()
    reference.assert_agrees(operator, _written_out(operator))
    assert (operator.singular_values([8]) == 0).all()
    assert (operator.singular_values([7])[..., 0] > 0).all()
    assert (decay_product_norm(operator) == 0).all()


def test_growth_beyond_the_range_of_float64_is_nan_and_no_exception() -> None:
    _, beta, k, q = _random()
    operator = DeltaRecurrence(torch.full((1, 1, 1, 1), 1000.0), beta, k, q)
    assert operator.singular_values([10]).isnan().all()


def test_a_growing_state_agrees_too() -> None:
    log_decay, beta, k, q = _random()
    operator = DeltaRecurrence(-log_decay, beta, k, q)
    reference.assert_agrees(operator, _written_out(operator))


def test_state_dimensions_of_very_different_scale_agree() -> None:
    log_decay, beta, k, q = _random(state=6)
    scale = 10.0 ** torch.linspace(-60, 60, 6, dtype=torch.float64)
    left, right = -beta[..., None] * k, log_decay.exp() * k
    operator = DeltaRecurrence.diagonal_plus_rank_one(log_decay, left * scale, right / scale, k * scale, q / scale)
    reference.assert_agrees(operator, _written_out(operator))


def test_a_state_larger_than_the_sequence_is_bounded_by_the_position() -> None:
    operator = DeltaRecurrence(*_random(length=7, state=50))
    values = operator.singular_values(range(1, 7))
    assert tolerance_ess(values)[0, 0].tolist() == [1, 2, 3, 3, 2, 1]
    reference.assert_agrees(operator, _written_out(operator))


def test_a_sequence_of_one_token_has_no_position() -> None:
    operator = DeltaRecurrence(*_random(length=1))
    assert operator.singular_values([]).shape[:3] == (2, 3, 0)
    assert operator.materialize().shape == (2, 3, 1, 1)
    torch.testing.assert_close(decay_product_norm(operator), torch.linalg.matrix_norm(_transitions(operator)[:, :, 0]))


@given(delta_recurrences())
def test_decay_is_the_product_and_the_trace_of_the_written_out_transitions(operator: DeltaRecurrence) -> None:
    A = _transitions(operator).expand(operator.batch, operator.heads, operator.length, -1, -1)
    product = torch.eye(operator.state_size).double().expand(*A.shape[:2], -1, -1)
    for t in range(operator.length):
        product = A[:, :, t] @ product
    norm, mean = decay_product_norm(operator), mean_decay(operator)
    allowed = reference.ERROR[norm.dtype]
    torch.testing.assert_close(norm.double(), torch.linalg.matrix_norm(product), rtol=10 * allowed, atol=allowed)
    trace = A.diagonal(dim1=-2, dim2=-1).mean((-2, -1))
    torch.testing.assert_close(mean.double(), trace, rtol=allowed, atol=allowed)


def test_without_decay_nothing_is_erased() -> None:
    log_decay, beta, k, q = _random()
    undecayed = DeltaRecurrence(log_decay, beta, k, q).without_decay()
    assert isinstance(undecayed, DiagonalRecurrence)
    reference.assert_agrees(undecayed, reference.recurrence(NO_DECAY, beta[..., None] * k, q))
    alone = DeltaRecurrence(log_decay, beta[:1, :1], k[:1, :1], q[:1, :1]).without_decay()
    assert (alone.batch, alone.heads) == (2, 3)


def test_retention_is_one_without_decay_and_erasure_and_below_with_them() -> None:
    log_decay, beta, k, q = _random()
    assert (retention(DeltaRecurrence(8 * log_decay, beta, k, q), [10]) < 1).all()
    held = DeltaRecurrence.diagonal_plus_rank_one(NO_DECAY, torch.zeros_like(k), k, k, q)
    assert (retention(held, [10]) == 1).all()


def test_the_capacity_is_the_state_size_at_every_position() -> None:
    operator = DeltaRecurrence(*_random(state=4))
    assert operator.state_capacity([1, 10, 19]).tolist() == [4.0, 4.0, 4.0]
    assert not operator.capacity_grows


def test_features_that_require_gradients_are_measured_without_a_graph() -> None:
    operator = DeltaRecurrence(*(tensor.requires_grad_() for tensor in _random()))
    assert not operator.singular_values([5]).requires_grad
    assert not operator.materialize().requires_grad


@pytest.mark.parametrize("state", [3, 4])
def test_a_single_operator_is_measured_without_writing_to_its_inputs(state: int) -> None:
    # One sample, one head, one chunk: the case in which every rearrangement is a view.
    tensors = _random(samples=1, heads=1, length=6, state=state)
    operator = DeltaRecurrence.diagonal_plus_rank_one(tensors[0], tensors[2], tensors[3], tensors[2], tensors[3])
    before = [tensor.clone() for tensor in operator.tensors]
    operator.singular_values([3])
    decay_product_norm(operator)
    assert all(torch.equal(old, new) for old, new in zip(before, operator.tensors, strict=True))


def test_no_block_is_as_large_as_the_operator_or_as_all_transitions() -> None:
    length, state = 4096, 64
    operator = DeltaRecurrence(*_random(samples=1, heads=1, length=length, state=state, dtype=torch.float32))
    with _LargestTensor() as seen:
        operator.singular_values([length // 2])
        decay_product_norm(operator)
        mean_decay(operator)
    assert seen.elements <= linalg.SLAB_ELEMENTS
    assert min(length * length, length * state * state) / 8 > linalg.SLAB_ELEMENTS


class _LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize(
    ("log_decay", "beta", "k", "q", "message"),
    [
        ((1, 1, 1, 1), (1, 2, 8), (1, 2, 8), (1, 2, 8), r"k has shape \(1, 2, 8\), expected \(batch, heads, length"),
        ((1, 1, 1, 1), (1, 2, 8, 1), (1, 2, 8, 4), (1, 2, 8, 4), r"beta has shape .*expected \(batch, heads, length\)"),
        ((1, 1, 1, 1), (1, 2, 8), (1, 2, 8, 4), (1, 2, 8, 3), r"q has shape .*same length and state"),
        ((1, 1, 7, 1), (1, 2, 8), (1, 2, 8, 4), (1, 2, 8, 4), "log_decay .*dimension 2 must be 1 or 8"),
        ((1, 1, 1, 2), (1, 2, 8), (1, 2, 8, 4), (1, 2, 8, 4), "log_decay .*dimension 3 must be 1 or 4"),
        ((1, 1, 1, 1), (1, 2, 7), (1, 2, 8, 4), (1, 2, 8, 4), "beta .*dimension 2 must be 1 or 8"),
        ((1, 3, 1, 1), (1, 2, 8), (1, 2, 8, 4), (1, 2, 8, 4), "has 2 heads, expected 1 or 3"),
        ((1, 1, 1, 1), (2, 2, 8), (3, 2, 8, 4), (1, 2, 8, 4), "has 2 samples, expected 1 or 3"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    log_decay: tuple[int, ...], beta: tuple[int, ...], k: tuple[int, ...], q: tuple[int, ...], message: str
) -> None:
    with pytest.raises(OperatorError, match=message):
        DeltaRecurrence(torch.zeros(log_decay), torch.zeros(beta), torch.zeros(k), torch.zeros(q))


def test_half_of_a_rank_one_part_is_refused() -> None:
    log_decay, beta, k, q = _random()
    with pytest.raises(OperatorError, match=r"left and right .* pass both or neither"):
        DeltaRecurrence(log_decay, beta, k, q, left=k)


def test_tensors_on_different_devices_or_of_integers_are_named() -> None:
    log_decay, beta, k, q = _random()
    with pytest.raises(OperatorError, match="q on meta"):
        DeltaRecurrence(log_decay, beta, k, q.to("meta"))
    with pytest.raises(OperatorError, match=r"beta has dtype torch\.int64"):
        DeltaRecurrence(log_decay, beta.long(), k, q)
