"""Singular values from Gram matrices: their counts and entropy are those of a float64 SVD, wherever they are used."""

from __future__ import annotations

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
    gramian,
    measure,
    tolerance_ess,
)
from ess_monitor.ess.gram_spectrum import (
    SINGLE_PRECISION,
    count_of_product,
    values_of_product,
)
from ess_monitor.ess.operators import blocks
from tests.ess import reference
from tests.ess.spectra import SPECTRA, TAU, assert_agrees, with_spectrum

HEADS, LENGTH, STATE = 2, 96, 16
POSITIONS = (24, 48, 71)
SHAPE = (1, HEADS, LENGTH, STATE)


@pytest.mark.parametrize("name", SPECTRA)
def test_the_spectrum_of_a_product_is_known_from_the_gramians_of_its_factors_or_said_not_to_be(name: str) -> None:
    torch.manual_seed(0)
    known_of = {}
    for scaling in (0.0, 4.0):  # state dimensions of very different sizes, which cancel in the product
        scale = torch.logspace(-scaling, scaling, 48, dtype=torch.float64)
        values = SPECTRA[name].sqrt()
        base = torch.linalg.qr(torch.randn(48, 48).double()).Q
        observing = with_spectrum(torch.ones(48), 60).mT @ torch.diag(values) @ base / scale
        controlling = scale[:, None] * base.mT @ torch.diag(values) @ with_spectrum(torch.ones(48), 60)
        exact = torch.linalg.svdvals(observing @ controlling)[:48]
        gramians = (controlling @ controlling.mT)[None], (observing.mT @ observing)[None]
        found, known = values_of_product(*gramians, TAU)
        count, is_counted = count_of_product(*gramians, TAU)
        if bool(known):
            assert_agrees(found[0], exact)
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
        assert_agrees(values, exact)
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
    monkeypatch.setattr(blocks, "singular_values_", refuse)
    assert_agrees(measure(operator, (200,)).singular_values[:, :, 0], exact)


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
