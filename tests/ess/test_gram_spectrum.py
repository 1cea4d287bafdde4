"""Singular values from Gram matrices: their counts and entropy are those of a float64 SVD, wherever they are used."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ess_monitor.ess import (
    DeltaRecurrence,
    DenseOperator,
    DiagonalRecurrence,
    GatedConvolution,
    Operator,
    ReadFirstRecurrence,
    SoftmaxAttention,
    decay_product_norm,
    gram_spectrum,
    gramian,
    measure,
    tolerance_ess,
)
from ess_monitor.ess.gram_spectrum import (
    DECADES,
    SINGLE_PRECISION,
    BlockSpectra,
    count_of_product,
    singular_values_by_gram,
    values_of_product,
)
from tests.ess import reference

TAU = 1e-3
TOLERANCES = tuple(TAU * 10.0**power for power in DECADES)
HEADS, LENGTH, STATE = 2, 96, 16
POSITIONS = (24, 48, 71)
SHAPE = (1, HEADS, LENGTH, STATE)


def _agrees(values: Tensor, exact: Tensor, tau: float = TAU) -> None:
    """Values (..., k) are those of an SVD (..., n) to what `known_values` says of them, k <= n."""
    largest = exact[..., :1]
    floor = (SINGLE_PRECISION * largest).clamp(max=1e-2 * tau)
    of_itself = (4e-15 * (largest / exact).square()).clamp(min=1e-3)
    error = torch.where(exact > floor, of_itself * exact, floor) + 1e-13 * largest
    padded = torch.zeros_like(exact)
    padded[..., : values.shape[-1]] = values[..., : exact.shape[-1]].double()
    assert ((padded - exact).abs() <= error).all()
    for power in DECADES:
        each = tau * 10.0**power
        near = ((exact - each).abs() <= 2e-7 * each + 1e-13 * largest).any(-1)
        same = (padded.to(values.dtype) > each).sum(-1) == (exact > each).sum(-1)
        assert (same | near).all(), each
    for one, other in zip(padded.reshape(-1, padded.shape[-1]), exact.reshape(-1, exact.shape[-1]), strict=True):
        assert math.isclose(reference.entropy_size(one), reference.entropy_size(other), rel_tol=1e-5)


def _spectrum(values: Tensor, columns: int | None = None) -> Tensor:
    """A random matrix with these singular values."""
    size = len(values)
    left = torch.linalg.qr(torch.randn(size, size).double()).Q
    right = torch.linalg.qr(torch.randn(columns or size, size).double()).Q
    return left @ torch.diag(values.double()) @ right.mT


def _levels(*logs: float) -> Tensor:
    """Values between powers of ten, which are not tolerances themselves."""
    return 0.7 * torch.logspace(*logs, 48, dtype=torch.float64)


SPECTRA: dict[str, Tensor] = {
    "well conditioned": _levels(0, -4),
    "ill conditioned": _levels(1, -9),
    "far below rounding": _levels(0, -30),
    "down to single precision": _levels(0, -6.2),
    "large, down to the smallest tolerance": 20 * _levels(0, -6),
    "rank deficient": _levels(0, -2) * (torch.arange(48) < 20),
    "clustered at the tolerance": TAU * (1 + torch.linspace(-1, 1, 48, dtype=torch.float64) * 1e-6),
    "clustered at a hundredth of the tolerance": 1e-2 * TAU * (1 + torch.linspace(-1, 1, 48).double() * 1e-3),
    "huge, full rank": 1e9 * _levels(0, -3),
    "huge, deficient": 1e12 * _levels(0, -2) * (torch.arange(48) < 40),
    "tiny": 1e-12 * _levels(0, -3),
    "nearly underflowing": 1e-160 * _levels(0, -3),
    "zero": torch.zeros(48, dtype=torch.float64),
    "one large": torch.cat([torch.tensor([1e6], dtype=torch.float64), TAU * _levels(1, -1)[1:]]),
    "just above rounding": torch.cat([_levels(0, -1)[:24], 3e-8 * _levels(0, -1)[24:]]),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("tau", [TAU, 0.0])
def test_the_spectrum_of_a_matrix_is_that_of_its_svd(name: str, tau: float) -> None:
    torch.manual_seed(0)
    matrices = torch.stack([_spectrum(SPECTRA[name], 70), _spectrum(_levels(0, -2), 70)])
    for given in (matrices, matrices.mT.contiguous()):
        values, known = singular_values_by_gram(given.clone(), tau)
        exact = torch.linalg.svdvals(given)
        if tau:
            _agrees(values, exact)
        else:
            torch.testing.assert_close(values, exact, rtol=1e-7, atol=1e-7 * float(exact[0, 0]))
        assert bool(known[1])


def test_gram_matrices_are_used_where_they_suffice_and_only_there() -> None:
    torch.manual_seed(0)
    known = {name: bool(singular_values_by_gram(_spectrum(each)[None], TAU)[1]) for name, each in SPECTRA.items()}
    assert known["well conditioned"]
    assert known["clustered at the tolerance"]
    assert known["down to single precision"]
    assert known["large, down to the smallest tolerance"]
    assert not any(known[name] for name in ("far below rounding", "huge, deficient", "one large"))


def test_a_value_at_the_tolerance_is_counted_by_the_svd() -> None:
    torch.manual_seed(0)
    for each in TOLERANCES:
        matrix = torch.diag(torch.cat([_levels(0, -2), torch.tensor([each], dtype=torch.float64)]))[None]
        values, known = singular_values_by_gram(matrix.clone(), TAU)
        assert not bool(known)
        assert int((values > each).sum()) == int((torch.linalg.svdvals(matrix) > each).sum())


def test_a_matrix_that_is_not_finite_gives_nan_and_leaves_the_others() -> None:
    torch.manual_seed(0)
    for bad in (torch.nan, torch.inf, 1e200):
        matrices = torch.stack([_spectrum(_levels(0, -2)) for _ in range(3)])
        exact = torch.linalg.svdvals(matrices)
        matrices[1, 3, 4] = bad
        found = singular_values_by_gram(matrices.clone(), TAU)[0]
        _agrees(found[::2], exact[::2])
        if bad == 1e200:
            torch.testing.assert_close(found[1], torch.linalg.svdvals(matrices[1]), rtol=1e-6, atol=1e186)
        else:
            assert found[1].isnan().all()


def test_rows_and_columns_of_zeros_are_left_out_and_an_unknown_block_is_the_last_that_is_tried() -> None:
    torch.manual_seed(0)
    blocks = torch.zeros(2, 60, 80, dtype=torch.float64)
    blocks[0, 3:51, 8:56], blocks[1, 3:51, 8:56] = _spectrum(_levels(0, -3)), _spectrum(_levels(0, -20))
    spectra = BlockSpectra(2, TAU)
    for _ in range(2):
        _agrees(spectra.values(slice(0, 2), blocks.clone()), torch.linalg.svdvals(blocks)[..., :48])
    assert spectra._by_gram.tolist() == [True, False]
    assert BlockSpectra(1, TAU).values(slice(0, 1), torch.zeros(1, 4, 5)).shape == (1, 0)


@pytest.mark.parametrize("name", SPECTRA)
def test_the_spectrum_of_a_product_is_known_from_the_gramians_of_its_factors_or_said_not_to_be(name: str) -> None:
    torch.manual_seed(0)
    known_of = {}
    for scaling in (0.0, 4.0):  # state dimensions of very different sizes, which cancel in the product
        scale = torch.logspace(-scaling, scaling, 48, dtype=torch.float64)
        values = SPECTRA[name].sqrt()
        base = torch.linalg.qr(torch.randn(48, 48).double()).Q
        observing = _spectrum(torch.ones(48), 60).mT @ torch.diag(values) @ base / scale
        controlling = scale[:, None] * base.mT @ torch.diag(values) @ _spectrum(torch.ones(48), 60)
        exact = torch.linalg.svdvals(observing @ controlling)[:48]
        gramians = (controlling @ controlling.mT)[None], (observing.mT @ observing)[None]
        found, known = values_of_product(*gramians, TAU)
        count, is_counted = count_of_product(*gramians, TAU)
        if bool(known):
            _agrees(found[0], exact)
        if bool(is_counted):
            assert int(count) == int((exact > TAU).sum())
        known_of[scaling] = bool(known)
    assert known_of[0.0] == known_of[4.0], "the scaling of the state dimensions does not matter"
    assert known_of[0.0] or name != "well conditioned"


def test_heads_that_share_a_gramian_are_counted_each() -> None:
    torch.manual_seed(0)
    observing = torch.randn(2, 1, 60, 16).double()
    scale = torch.logspace(-6, 0, 5, dtype=torch.float64)
    controlling = torch.randn(2, 5, 16, 60).double() * scale[:, None, None]
    controlling[1, 4] = 0.0
    gramians = controlling @ controlling.mT, observing.mT @ observing
    exact = (torch.linalg.svdvals(observing @ controlling)[..., :16] > TAU).sum(-1)
    count, known = count_of_product(*gramians, TAU)
    assert exact.tolist() == [[0, 13, 16, 16, 16], [0, 14, 16, 16, 0]]
    assert torch.equal(count[known], exact[known].double())
    assert known[:, 2:4].all()
    assert not known[1, 4]


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _keys() -> Tensor:
    return normalize(_randn(*SHAPE), dim=-1)


def _decays(rate: float) -> Tensor:
    return -rate * torch.rand(SHAPE)


def _resets() -> Tensor:
    return _decays(0.05).masked_fill(torch.arange(LENGTH)[:, None] == 40, -torch.inf)


def _zero_decays() -> Tensor:
    return _decays(0.1).masked_fill(torch.rand(SHAPE) < 0.02, -torch.inf)


def _deficient(rank: int) -> Tensor:
    return _randn(1, HEADS, LENGTH, rank) @ _randn(1, HEADS, rank, STATE)


def _banded(width: int) -> Tensor:
    token = torch.arange(LENGTH)
    return (token[:, None] - token < width)[None, None]


OPERATORS: dict[str, Callable[[], Operator]] = {
    "no decay": lambda: DiagonalRecurrence(torch.zeros(1, 1, 1, 1), _randn(*SHAPE), _randn(*SHAPE)),
    "weak decay": lambda: DiagonalRecurrence(_decays(0.1), _randn(*SHAPE), _randn(*SHAPE)),
    "scalar decay, shared features": lambda: DiagonalRecurrence(
        _decays(0.3)[..., :1], _randn(1, 1, LENGTH, STATE), _randn(*SHAPE)
    ),
    "strong decay": lambda: DiagonalRecurrence(_decays(3.0), _randn(*SHAPE), _randn(*SHAPE)),
    "strong and weak heads": lambda: DiagonalRecurrence(
        torch.tensor([-4.0, -0.02])[None, :, None, None], _randn(*SHAPE), _randn(*SHAPE)
    ),
    "the same strong head of two samples, shared reads": lambda: DiagonalRecurrence(
        torch.tensor([-4.0, -0.02])[None, :, None, None], _randn(2, HEADS, LENGTH, STATE), _randn(*SHAPE)[:, :1]
    ),
    "another strong head of each sample, shared reads": lambda: DiagonalRecurrence(
        torch.tensor([[-4.0, -0.02], [-0.02, -4.0]])[..., None, None], _randn(*SHAPE), _randn(2, 1, LENGTH, STATE)
    ),
    "resets": lambda: DiagonalRecurrence(_resets(), _randn(*SHAPE), _randn(*SHAPE)),
    "decays of zero": lambda: DiagonalRecurrence(_zero_decays(), _randn(*SHAPE), _randn(*SHAPE)),
    "growing": lambda: DiagonalRecurrence(-_decays(0.05), _randn(*SHAPE), _randn(*SHAPE)),
    "deficient": lambda: DiagonalRecurrence(torch.zeros(1, 1, 1, 1), _deficient(9), _deficient(11)),
    "deficient, huge": lambda: DiagonalRecurrence(torch.zeros(1, 1, 1, 1), 1e5 * _deficient(9), 1e5 * _randn(*SHAPE)),
    "tiny": lambda: DiagonalRecurrence(_decays(0.1), 1e-4 * _randn(*SHAPE), 1e-4 * _randn(*SHAPE)),
    "a head of zeros": lambda: DiagonalRecurrence(
        _decays(0.1), _randn(*SHAPE) * torch.tensor([0.0, 1.0])[:, None, None], _randn(*SHAPE)
    ),
    "features of very different sizes": lambda: DiagonalRecurrence(
        _decays(0.1), _randn(*SHAPE) * torch.logspace(-6, 6, STATE), _randn(*SHAPE) * torch.logspace(5, -5, STATE)
    ),
    "double precision": lambda: DiagonalRecurrence(_decays(0.1).double(), _randn(*SHAPE).double(), _randn(*SHAPE)),
    "read first": lambda: ReadFirstRecurrence(_decays(0.1), _randn(*SHAPE), _randn(*SHAPE)),
    "delta rule": lambda: DeltaRecurrence(_decays(0.1), torch.rand(1, HEADS, LENGTH), _keys(), _randn(*SHAPE)),
    "delta rule, strong decay": lambda: DeltaRecurrence(
        _decays(3.0), torch.rand(1, HEADS, LENGTH), _keys(), _randn(*SHAPE)
    ),
    "delta rule, overwriting": lambda: DeltaRecurrence(
        torch.zeros(1, 1, 1, 1), 2 * torch.rand(1, HEADS, LENGTH), _keys(), _randn(*SHAPE)
    ),
    "diagonal plus rank one": lambda: DeltaRecurrence.diagonal_plus_rank_one(
        _decays(0.1), 0.3 * _keys(), -_keys(), _randn(*SHAPE), _randn(*SHAPE)
    ),
    "attention": lambda: SoftmaxAttention(_randn(*SHAPE), _randn(*SHAPE)),
    "attention, even": lambda: SoftmaxAttention(0.01 * _randn(*SHAPE), _randn(*SHAPE)),
    "attention, peaked": lambda: SoftmaxAttention(20 * _randn(*SHAPE), _randn(*SHAPE)),
    "attention in a window": lambda: SoftmaxAttention(_randn(*SHAPE), _randn(*SHAPE), mask=_banded(40)),
    "gated convolution": lambda: GatedConvolution(
        _randn(1, HEADS, LENGTH), _randn(1, HEADS, LENGTH), _randn(1, HEADS, LENGTH)
    ),
    "matrix": lambda: DenseOperator(_randn(1, HEADS, LENGTH, LENGTH).tril()),
    "matrix of blocks": lambda: DenseOperator(_randn(1, HEADS, 2 * LENGTH, 2 * LENGTH).tril(), block_size=2),
}


def _matrix(operator: Operator) -> Tensor:
    """T in float64, by formulas of the tests."""
    match operator:
        case ReadFirstRecurrence(log_decay=log_decay, b=b, c=c):
            later = torch.cat([torch.zeros_like(log_decay[:, :, :1]), log_decay[:, :, :-1]], 2)
            return reference.recurrence(later, torch.roll(b, 1, 2), c).roll(-1, 3).tril(-1)
        case DiagonalRecurrence(log_decay=log_decay, b=b, c=c):
            return reference.recurrence(log_decay, b, c)
        case DeltaRecurrence(log_decay=log_decay, beta=beta, k=k, q=q, left=left, right=right):
            if left is None or right is None:
                A = reference.delta_rule(log_decay.expand(-1, -1, LENGTH, -1), beta, k)
            else:
                A = reference.diagonal_plus_rank_one(log_decay, left, right)
            return reference.matrix_recurrence(A, beta.double()[..., None] * k.double(), q)
        case SoftmaxAttention(q=q, k=k, mask=mask):
            return reference.attention(q, k, mask=mask)
        case GatedConvolution(b=b, kernel=kernel, c=c):
            return reference.convolution(kernel, LENGTH, b, c)
        case DenseOperator(T=T):
            return T.double()
    raise AssertionError


@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_measured_is_that_of_the_svd_of_the_materialized_operator(name: str) -> None:
    torch.manual_seed(1)
    operator = OPERATORS[name]()
    T = _matrix(operator)
    measured = measure(operator, POSITIONS, tolerance=TAU)
    for p, i in enumerate(POSITIONS):
        exact = reference.singular_values(T, i, operator.block_size)
        values = measured.singular_values[:, :, p]
        if values.shape[-1] < exact.shape[-1]:
            assert (exact[..., values.shape[-1] :] <= 1e-12 * exact[..., :1]).all()
            exact = exact[..., : values.shape[-1]]
        _agrees(values, exact)
    undecayed = operator.without_decay()
    if undecayed is None:
        return
    assert measured.undecayed_ess is not None
    T = _matrix(undecayed)
    for p, i in enumerate(POSITIONS):
        exact = reference.singular_values(T, i)
        near = ((exact - TAU).abs() <= 1e-6 * TAU + 1e-12 * exact[..., :1]).any(-1)
        assert (near | (measured.undecayed_ess[:, :, p] == (exact > TAU).sum(-1))).all()


def test_recurrences_of_full_rank_are_measured_without_a_factorization(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(gramian, "two_sided_singular_values", refuse)
    for name in ("no decay", "weak decay", "scalar decay, shared features", "features of very different sizes"):
        torch.manual_seed(1)
        measure(OPERATORS[name](), POSITIONS)
    torch.manual_seed(1)
    with pytest.raises(AssertionError):
        measure(OPERATORS["deficient"](), POSITIONS)


def test_attention_as_at_its_initialization_is_measured_without_an_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError

    torch.manual_seed(1)
    operator = SoftmaxAttention(0.5 * torch.randn(1, 1, 400, 16), 0.5 * torch.randn(1, 1, 400, 16))
    exact = reference.singular_values(reference.attention(operator.q, operator.k), 200)
    assert ((exact < 6e-6 * exact[..., :1]) & (exact > SINGLE_PRECISION * exact[..., :1])).any()
    monkeypatch.setattr(gram_spectrum, "singular_values_", refuse)
    _agrees(measure(operator, (200,)).singular_values[:, :, 0], exact)


def test_a_product_of_transitions_that_rounds_to_zero_is_zero_and_that_of_other_heads_is_computed() -> None:
    torch.manual_seed(1)
    log_decay = torch.tensor([-2.0, -0.01])[None, :, None, None]
    operator = DeltaRecurrence(log_decay, torch.rand(1, HEADS, LENGTH), _keys(), _randn(*SHAPE))
    product = torch.eye(STATE).double()
    for A in reference.delta_rule(log_decay.expand(-1, -1, LENGTH, -1), operator.beta, operator.k).unbind(2):
        product = A @ product
    expected = torch.linalg.matrix_norm(product)
    assert expected[0, 0] > 0
    torch.testing.assert_close(decay_product_norm(operator), expected.float(), rtol=1e-5, atol=0)
    assert decay_product_norm(operator.map(Tensor.double))[0, 0] > 0


def test_singular_values_that_are_asked_for_alone_are_exact() -> None:
    torch.manual_seed(1)
    operator = OPERATORS["weak decay"]().map(Tensor.double)
    reference.assert_agrees(operator, _matrix(operator), positions=POSITIONS)
    counts = tolerance_ess(operator.singular_values(POSITIONS), TAU)
    assert torch.equal(counts, measure(operator, POSITIONS).tolerance_ess)
