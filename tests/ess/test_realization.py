"""A recurrence that computes T with the smallest state, and what less costs, against T built entry by entry."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ess_monitor.errors import ConfigError, OperatorError
from ess_monitor.ess import (
    Convolution,
    DeltaRecurrence,
    DenseOperator,
    DiagonalRecurrence,
    GatedConvolution,
    JacobianOperator,
    Operator,
    ReadFirstRecurrence,
    Realization,
    SoftmaxAttention,
    causal_singular_values,
    complex_recurrence,
    realize,
    squared_norm,
    tail_energy,
    truncation_errors,
)
from tests.ess import reference

LENGTH = 32
Case = tuple[Operator, Tensor]


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _diagonal(log_decay: Tensor, state: int = 6) -> Case:
    b, c = _randn(2, 3, LENGTH, state), _randn(2, 1, LENGTH, state)
    return DiagonalRecurrence(log_decay, b, c), reference.recurrence(log_decay, b, c)


def _gated_with_resets() -> Case:
    log_decay = -_randn(2, 3, LENGTH, 6).abs()
    return _diagonal(log_decay.masked_fill(torch.rand_like(log_decay) < 0.1, -torch.inf))


def _read_first() -> Case:
    log_decay, b, c = -0.3 * _randn(2, 3, LENGTH, 4).abs(), _randn(2, 3, LENGTH, 4), _randn(2, 3, LENGTH, 4)
    # T_ij has the decays between j and i alone: that of token i is left out by reading with c / decay.
    T = reference.recurrence(log_decay, b, c * (-log_decay).exp()).tril(-1)
    return ReadFirstRecurrence(log_decay, b, c), T


def _delta(largest_beta: float = 1.0) -> Case:
    log_decay, q = -0.2 * _randn(2, 3, LENGTH, 1).abs(), _randn(2, 3, LENGTH, 5)
    beta = largest_beta * torch.rand(2, 3, LENGTH, dtype=torch.float64)
    k = torch.nn.functional.normalize(_randn(2, 3, LENGTH, 5), dim=-1)
    T = reference.matrix_recurrence(reference.delta_rule(log_decay, beta, k), beta[..., None] * k, q)
    return DeltaRecurrence(log_decay, beta, k, q), T


def _rwkv7() -> Case:
    left, b, c = (_randn(2, 3, LENGTH, 4) for _ in range(3))
    right, log_decay = -0.3 * left / left.square().sum(-1, keepdim=True), -0.5 * torch.rand(2, 3, LENGTH, 4).double()
    T = reference.matrix_recurrence(reference.diagonal_plus_rank_one(log_decay, left, right), b, c)
    return DeltaRecurrence.diagonal_plus_rank_one(log_decay, left, right, b, c), T


def _complex() -> Case:
    log_decay = torch.complex(-0.1 * torch.rand(1, 3, 1, 2).double(), 3 * torch.rand(1, 3, 1, 2).double())
    b, c = (
        torch.complex(_randn(2, 3, LENGTH, 2), _randn(2, 3, LENGTH, 2)),
        torch.complex(_randn(2, 3, LENGTH, 2), _randn(2, 3, LENGTH, 2)),
    )
    T = torch.zeros(2, 3, LENGTH, LENGTH, dtype=torch.float64)
    for i in range(LENGTH):
        for j in range(i + 1):
            T[:, :, i, j] = (c[:, :, i] * ((i - j) * log_decay[:, :, 0]).exp() * b[:, :, j]).sum(-1).real
    return complex_recurrence(log_decay, b, c), T


def _attention(**settings: Tensor) -> Case:
    q, k = _randn(2, 4, LENGTH, 8), _randn(2, 2, LENGTH, 8)
    return SoftmaxAttention(q, k, **settings), reference.attention(q, k, mask=settings.get("mask"))  # type: ignore[arg-type]


def _window(width: int) -> Tensor:
    token = torch.arange(LENGTH)
    return (token > token[:, None] - width)[None, None]


def _convolution(taps: int) -> Case:
    kernel = _randn(1, 3, taps)
    return Convolution(kernel, LENGTH), reference.convolution(kernel, LENGTH)


def _gated_convolution() -> Case:
    b, kernel, c = _randn(2, 3, LENGTH), _randn(1, 3, 5), _randn(2, 3, LENGTH)
    return GatedConvolution(b, kernel, c), reference.convolution(kernel, LENGTH, b, c)


def _dense(block_size: int) -> Case:
    T = _randn(2, 2, 16 * block_size, 16 * block_size)
    token = torch.arange(T.shape[-1]) // block_size
    return DenseOperator(T, block_size), T.masked_fill(token > token[:, None], 0.0)


def _jacobian() -> Case:
    gru, inputs = torch.nn.GRU(3, 2, batch_first=True).double(), _randn(2, 1, 10, 3)
    blocks = [
        torch.autograd.functional.jacobian(lambda u: gru(u[None])[0][0].flatten(), sample[0]).flatten(1)  # type: ignore[no-untyped-call]
        for sample in inputs
    ]
    return JacobianOperator(inputs, lambda u: gru(u)[0], tolerance=0.0), torch.stack(blocks)[:, None]


CASES: dict[str, Callable[[], Case]] = {
    "linear attention": lambda: _diagonal(torch.zeros(1, 1, 1, 1).double()),
    "scalar decay": lambda: _diagonal(-0.2 * torch.rand(2, 3, LENGTH, 1).double()),
    "diagonal decay": lambda: _diagonal(-_randn(2, 3, LENGTH, 6).abs()),
    "fixed decay": lambda: _diagonal(-0.1 * torch.rand(1, 3, 1, 6).double()),
    "decays of zero": _gated_with_resets,
    "complex decay": _complex,
    "read first": _read_first,
    "delta rule": _delta,
    "delta rule, negative eigenvalues": lambda: _delta(2.0),
    "diagonal plus rank one": _rwkv7,
    "attention": _attention,
    "attention in a window": lambda: _attention(mask=_window(4)),
    "short filter": lambda: _convolution(4),
    "one tap": lambda: _convolution(1),
    "long filter": lambda: _convolution(LENGTH),
    "gated filter": _gated_convolution,
    "dense": lambda: _dense(1),
    "dense blocks": lambda: _dense(2),
    "Jacobian": _jacobian,
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def _blocks(operator: Operator, T: Tensor) -> list[Tensor]:
    """H_i for i = 1..L-1, with blocks of any shape."""
    rows, columns = (size // operator.length for size in T.shape[2:])
    return [T[:, :, rows * i :, : columns * i] for i in range(1, operator.length)]


def _values(operator: Operator, T: Tensor) -> Tensor:
    """Singular values of every H_i: (batch, heads, positions, rank)."""
    each = [torch.linalg.svdvals(block) for block in _blocks(operator, T)]
    rank = max(values.shape[-1] for values in each)
    return torch.stack([torch.nn.functional.pad(values, (0, rank - values.shape[-1])) for values in each], dim=2)


def _assert_close(actual: Tensor, expected: Tensor, error: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= error * expected.abs().max()


def test_a_full_realization_computes_t(case: Case) -> None:
    operator, T = case
    realization = realize(operator)
    _assert_close(realization.materialize(), T)
    u = _randn(*T.shape[:2], operator.length, T.shape[3] // operator.length, 3)
    _assert_close(realization.outputs(u).flatten(2, 3), T @ u.flatten(2, 3))


def test_the_state_of_a_full_realization_has_the_rank_of_every_block(case: Case) -> None:
    operator, T = case
    ranks = torch.stack([torch.linalg.matrix_rank(block, rtol=1e-12) for block in _blocks(operator, T)], dim=2)
    sizes = realize(operator).state_sizes
    assert (sizes[:, :, 0] == 0).all()
    assert torch.equal(sizes[:, :, 1:], ranks.double())


def test_a_truncation_errs_by_about_the_largest_singular_value_that_it_leaves_out(case: Case) -> None:
    operator, T = case
    values = torch.nn.functional.pad(_values(operator, T), (0, 4))
    for size in (0, 1, 3):
        realization = realize(operator, size=size)
        error = torch.linalg.matrix_norm(realization.materialize() - T, 2)
        left_out = values[..., size].amax(-1)
        assert realization.state_sizes.max() <= size
        if size == 0:
            assert realization.A.shape[3:] == (0, 0)
        assert (error >= left_out * (1 - 1e-9) - 1e-12).all(), "no operator with this state comes nearer"
        assert (error <= 1.6 * left_out + 1e-12 * values.max()).all()


def test_a_tolerance_keeps_the_singular_values_above_it(case: Case) -> None:
    operator, T = case
    values = _values(operator, T)
    tolerance = 0.3 * float(values.max())
    realization = realize(operator, tolerance=tolerance)
    assert torch.equal(realization.state_sizes[:, :, 1:], (values > tolerance).sum(-1).double())
    error = torch.linalg.matrix_norm(realization.materialize() - T, 2)
    assert (error <= 1.6 * tolerance).all()


def test_a_realization_truncated_later_is_the_one_of_that_size(case: Case) -> None:
    operator, _ = case
    full, two = realize(operator), realize(operator, size=2)
    later = full.truncated(2)
    assert torch.equal(later.state_sizes, two.state_sizes)
    _assert_close(later.materialize(), two.materialize())
    assert full.truncated(1000).size == full.size


def test_the_tail_energy_is_that_of_the_blocks(case: Case) -> None:
    operator, T = case
    squares = _values(operator, T).square()
    for size, energy in zip((0, 1, 3, 1000), tail_energy(operator, [0, 1, 3, 1000]).unbind(-1), strict=True):
        assert (energy - squares[..., size:].sum(-1)).abs().max() <= 1e-9 * squares.max()
    few = tail_energy(operator, [1], [5, 2])
    torch.testing.assert_close(few, tail_energy(operator, [1])[:, :, [4, 1]])


def test_the_squared_norm_is_that_of_all_entries(case: Case) -> None:
    operator, T = case
    if isinstance(operator, DenseOperator):
        operator = DenseOperator(T, operator.block_size)
    torch.testing.assert_close(squared_norm(operator), T.square().sum((2, 3)))


def test_truncation_errors_are_those_of_the_truncated_operators(case: Case) -> None:
    operator, T = case
    realization = realize(operator)
    sizes = (0, 1, 2, 5, realization.size)
    errors = truncation_errors(realization, sizes)
    norm = torch.linalg.matrix_norm(T)
    for size, error in zip(sizes, errors.unbind(-1), strict=True):
        expected = torch.linalg.matrix_norm(realization.truncated(size).materialize() - T) / norm
        torch.testing.assert_close(error, expected, rtol=1e-6, atol=1e-7)
        floor = tail_energy(operator, [size]).amax((2, 3)).sqrt() / norm
        assert (floor <= error + 1e-7).all()


def test_causal_singular_values_are_those_of_what_inputs_leave_in_the_state() -> None:
    log_decay, b, c = -_randn(2, 3, 10, 4).abs(), _randn(2, 3, 10, 4), _randn(2, 3, 10, 4)
    values = causal_singular_values(DiagonalRecurrence(log_decay, b, c), [7, 1])
    for p, i in enumerate((7, 1)):
        columns = [log_decay[:, :, j + 1 : i].sum(2).exp() * b[:, :, j] for j in range(i)]
        expected = torch.linalg.svdvals(torch.stack(columns, dim=-1))
        padded = torch.nn.functional.pad(expected, (0, 4 - expected.shape[-1]))
        torch.testing.assert_close(values[:, :, p], padded, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("attention", [1, 8, 31]),
        ("attention in a window", [1, 3, 3]),
        ("short filter", [1, 3, 3]),
        ("long filter", [1, 8, 31]),
        ("one tap", [0, 0, 0]),
        ("dense blocks", [2, 16, 30]),
        ("Jacobian", [3, 24, 27]),
    ],
)
def test_without_a_recurrence_the_inputs_are_stored(name: str, stored: list[int]) -> None:
    operator, _ = CASES[name]()
    positions = [1, 8, operator.length - 1]
    values = causal_singular_values(operator, positions)
    expected = torch.arange(values.shape[-1]) < torch.tensor(stored)[:, None]
    torch.testing.assert_close(values, expected.double().expand_as(values))


SEGMENTS = torch.tensor([[[0] * 10 + [1] * 15 + [-1] * 7], [[-1] * 2 + [4] * 30]])


@pytest.mark.parametrize("name", ["diagonal decay", "read first", "delta rule", "attention", "gated filter"])
def test_segments_and_padding_are_realized_apart(name: str) -> None:
    operator, T = CASES[name]()
    fields = {field: getattr(operator, field) for field in operator.__dataclass_fields__ if field != "segments"}
    packed = type(operator)(**fields, segments=SEGMENTS)
    rows = SEGMENTS[:, 0]
    together = (rows[:, :, None] == rows[:, None]) & (rows[:, None] >= 0)
    T = torch.where(together[:, None], T, 0.0)
    realization = realize(packed)
    _assert_close(realization.materialize(), T)
    assert (realization.state_sizes[0, :, [0, 10, 25, 31]] == 0).all()
    torch.testing.assert_close(squared_norm(packed), T.square().sum((2, 3)))
    energy = tail_energy(packed, [1])
    expected = _values(packed, T).square()[..., 1:].sum(-1)
    torch.testing.assert_close(energy[..., 0], expected, atol=1e-9, rtol=1e-9)
    causal = (causal_singular_values(packed, [4, 10, 12, 28]) > 1e-9).sum(-1)
    assert (causal[0, :, [1, 3]] == 0).all()
    assert (causal[0, :, 2] == 2).all(), "two tokens of the second sequence are before position 12"
    assert (causal[1, :, 0] == 2).all(), "two tokens before position 4 are no padding"


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("kind", ["recurrence", "attention", "dense"])
def test_sequences_of_one_and_two_tokens_are_realized(kind: str, length: int) -> None:
    vectors = [_randn(1, 2, length, 3) for _ in range(2)]
    decay = torch.zeros(1, 1, 1, 1).double()
    made: dict[str, Case] = {
        "recurrence": (DiagonalRecurrence(decay, *vectors), reference.recurrence(decay, *vectors)),
        "attention": (SoftmaxAttention(*vectors), reference.attention(*vectors)),
        "dense": (DenseOperator(torch.eye(length).double()), torch.eye(length).double()[None, None]),
    }
    operator, T = made[kind]
    realization = realize(operator)
    _assert_close(realization.materialize(), T)
    assert realization.size == (0 if length == 1 or kind == "dense" else 1)
    assert tail_energy(operator, [0, 1]).shape == (*T.shape[:2], length - 1, 2)
    _assert_close(truncation_errors(realization, [1]), torch.zeros(*T.shape[:2], 1).double(), 1.0)


@pytest.mark.parametrize("given", [{}, {"size": 2}, {"tolerance": 0.0}])
def test_an_operator_of_zeros_has_no_state_and_no_error(given: dict[str, float]) -> None:
    zeros = torch.zeros(1, 2, 6, 3)
    operators = [
        DiagonalRecurrence(zeros, zeros, zeros),
        DiagonalRecurrence(torch.full_like(zeros, -torch.inf), torch.ones_like(zeros), torch.ones_like(zeros)),
        DeltaRecurrence(zeros, torch.ones(1, 1, 6), zeros, zeros),
        Convolution(torch.zeros(1, 2, 3), 6),
        DenseOperator(torch.zeros(1, 2, 6, 6)),
    ]
    for operator in operators:
        realization = realize(operator, **given)  # type: ignore[arg-type]
        assert (realization.state_sizes == 0).all()
        assert torch.equal(realization.materialize(), torch.diag_embed(operator.materialize().diagonal(dim1=2, dim2=3)))
        assert (truncation_errors(realization, [0, 2]) == 0).all()


def test_an_operator_that_is_not_finite_spoils_no_other(case: Case) -> None:
    operator, _ = case
    if isinstance(operator, JacobianOperator):
        return  # a function that gives NaN is refused
    name = next(iter(operator._tensor_fields))
    spoiled = operator._tensor_fields[name].clone()
    spoiled[(0, 0, *(-1 for _ in spoiled.shape[2:-1]), 0)] = torch.nan
    fields = {field: getattr(operator, field) for field in operator.__dataclass_fields__}
    broken = type(operator)(**{**fields, name: spoiled})
    bad = ~broken.finite()
    clean, realization = realize(operator, size=2), realize(broken, size=2)
    assert bad.any()
    assert realization.state_sizes[bad].isnan().all()
    assert realization.A[bad].isnan().all()
    if not bad.all():
        _assert_close(realization.materialize()[~bad], clean.materialize()[~bad])
    assert causal_singular_values(broken, [3])[bad].isnan().all()
    assert truncation_errors(realization, [1])[bad].isnan().all()


def test_float32_gives_float32() -> None:
    operator = CASES["diagonal decay"]()[0].map(lambda tensor: tensor.float())
    realization = realize(operator)
    results = [
        realization.A,
        realization.state_sizes,
        tail_energy(operator, [1]),
        causal_singular_values(operator, [3]),
    ]
    assert {result.dtype for result in results} == {torch.float32}
    _assert_close(realization.materialize(), operator.materialize(), 2e-6)


def test_many_operators_are_realized_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [CASES[name]() for name in ("decays of zero", "delta rule", "attention")]
    expected = [realize(operator) for operator, _ in cases]
    monkeypatch.setattr("ess_monitor.ess.realization.realize._OPERATOR_ELEMENTS", 2000)
    monkeypatch.setattr("ess_monitor.ess.realization.balanced.SLAB_ELEMENTS", 500)
    for (operator, T), whole in zip(cases, expected, strict=True):
        realization = realize(operator)
        assert torch.equal(realization.state_sizes, whole.state_sizes)
        _assert_close(realization.materialize(), T)


def test_wrong_arguments_are_named_with_what_is_allowed() -> None:
    operator, _ = CASES["diagonal decay"]()
    with pytest.raises(OperatorError, match=r"size=-1 must be a whole number from 0"):
        realize(operator, size=-1)
    with pytest.raises(OperatorError, match="pass one of them"):
        realize(operator, size=1, tolerance=0.1)
    with pytest.raises(ConfigError, match="tolerance=-1"):
        realize(operator, tolerance=-1)
    with pytest.raises(OperatorError, match="capture_operators"):
        realize(torch.zeros(3, 3))  # type: ignore[arg-type]
    realization = realize(operator)
    with pytest.raises(OperatorError, match=r"inputs has shape \(1, 1, 5, 1, 1\)"):
        realization.outputs(torch.zeros(1, 1, 5, 1, 1))
    with pytest.raises(OperatorError, match="sizes=1"):
        truncation_errors(realization, 1)  # type: ignore[arg-type]
    with pytest.raises(OperatorError, match="realize"):
        truncation_errors(operator, [1])  # type: ignore[arg-type]
    unknown = torch.full((1, 1, LENGTH), -2)
    padded = DiagonalRecurrence(*(getattr(operator, name) for name in ("log_decay", "b", "c")), segments=unknown)
    for function in (realize, lambda each: causal_singular_values(each, [3])):
        with pytest.raises(OperatorError, match="padding"):
            function(padded)
    assert isinstance(realization, Realization)
