"""The share of an operator that comes from afar, against T in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ess_monitor.errors import OperatorError
from ess_monitor.ess import (
    Convolution,
    DeltaRecurrence,
    DenseOperator,
    DiagonalRecurrence,
    GatedConvolution,
    Operator,
    ReadFirstRecurrence,
    SoftmaxAttention,
    far_share,
    linalg,
    measure,
)
from ess_monitor.ess.metrics import ToleranceScale
from tests.ess import reference
from tests.ess.kinds import HEADS, KINDS, LENGTH, SAMPLES


@pytest.fixture(params=KINDS)
def operator(request: pytest.FixtureRequest) -> Operator:
    return KINDS[request.param]()


def norms(T: Tensor, position: int, distance: int, block_size: int = 1) -> tuple[Tensor, Tensor]:
    """||T[p+d:, :p]||_F^2 and ||T[p+d:, :]||_F^2, by the definition."""
    length = T.shape[-1] // block_size
    token = torch.arange(length).repeat_interleave(block_size)
    rows = T.double().masked_fill(token > token[:, None], 0.0)[..., block_size * (position + distance) :, :]
    return rows[..., : block_size * position].square().sum((2, 3)), rows.square().sum((2, 3))


def assert_share(operator: Operator, T: Tensor, position: int, distance: int, error: float = 1e-5) -> None:
    found = far_share(operator, position, distance)
    far, total = norms(T, position, distance, operator.block_size)
    assert found.far_squared.shape == found.total_squared.shape == (operator.batch, operator.heads)
    # Relative to the share itself, down to shares of a millionth of T.
    torch.testing.assert_close(found.far_squared.double() / total, far / total, rtol=error, atol=1e-14)
    torch.testing.assert_close(found.total_squared.double(), total, rtol=error, atol=0)


def test_every_kind_has_the_norms_of_its_matrix_at_every_place(operator: Operator) -> None:
    T = operator.materialize()
    for position in range(1, LENGTH):
        for distance in range(LENGTH - position):
            assert_share(operator, T, position, distance, 1e-9)


@pytest.mark.parametrize("scale", ["absolute", "output"])
def test_one_measurement_holds_the_same_shares_and_sizes(operator: Operator, scale: ToleranceScale) -> None:
    positions, alone = [3, LENGTH // 2], measure(operator, [3, LENGTH // 2], tolerance_scale=scale)
    assert alone.far_share is None
    for place in ((LENGTH // 2, 2), (1, 0), (1, 3), (LENGTH - 1, 0)):  # also of rows before the first position
        together = measure(operator, positions, tolerance_scale=scale, far_share_at=place)
        assert together.far_share is not None
        expected = far_share(operator, *place)
        for one, other in zip(together.far_share, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
        torch.testing.assert_close(together.singular_values, alone.singular_values, rtol=0, atol=0)


def test_positions_are_checked_and_may_be_none_where_shares_are_asked_for(operator: Operator) -> None:
    with pytest.raises(OperatorError, match="positions"):
        measure(operator, torch.tensor([3, 6]), far_share_at=(6, 1))  # type: ignore[arg-type]
    empty = measure(operator, (), far_share_at=(6, 1))
    assert empty.tolerance_ess.shape == (operator.batch, operator.heads, 0)
    assert empty.far_share is not None
    for one, other in zip(empty.far_share, far_share(operator, 6, 1), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_a_measurement_names_a_place_without_rows(operator: Operator) -> None:
    for place, name in (((0, 1), "position=0"), ((3, LENGTH), f"distance={LENGTH}")):
        with pytest.raises(OperatorError, match=name):
            measure(operator, [3], far_share_at=place)


def _log_decays(strength: float, *shape: int) -> Tensor:
    return -strength * torch.rand(shape, dtype=torch.float64)


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("strength", [0.0, 1e-6, 0.05, 1.0, 30.0, 800.0])
@pytest.mark.parametrize("length", [2, 9, 64, 150, 257])
def test_diagonal_recurrences_of_every_decay_have_the_norms_of_their_matrix(
    present: bool, strength: float, length: int
) -> None:
    shape = (2, 3, length, 5)
    b, c = torch.randn(2, 1, length, 5).double(), torch.randn(1, 3, length, 5).double()
    for decay_shape in (shape, (1, 3, length, 1), (1, 1, 1, 5)):
        log_decay = _log_decays(strength, *decay_shape)
        log_decay = log_decay.masked_fill(torch.rand(decay_shape) < 0.01, -torch.inf)
        operator = (DiagonalRecurrence if present else ReadFirstRecurrence)(log_decay, b, c)
        assert_share(operator, operator.materialize(), max(1, length // 2), length // 8 if length > 2 else 0)


def test_heads_of_a_delta_rule_that_have_forgotten_what_was_before_are_measured_without_it() -> None:
    shape = (2, 3, 120, 6)
    k = torch.nn.functional.normalize(torch.randn(shape).double(), dim=-1)
    log_decay = torch.tensor([-3.0, -0.02, -1.5]).double()[None, :, None, None]
    for decay in (log_decay, log_decay.expand(-1, -1, 120, -1), log_decay.masked_fill(log_decay < -2, -torch.inf)):
        operator = DeltaRecurrence(decay, torch.rand(2, 3, 120).double(), k, torch.randn(2, 1, 120, 6).double())
        T = reference.matrix_recurrence(
            reference.delta_rule(decay.expand(2, 3, 120, 1), operator.beta, k),
            operator.beta[..., None] * k,
            operator.q.expand(shape),
        )
        assert_share(operator, T, 50, 30)
        assert (far_share(operator, 50, 30).far_squared == 0).tolist() == [[True, False, True]] * 2


def test_sequences_that_were_packed_see_nothing_of_the_one_before() -> None:
    shape = (1, 2, 40, 4)
    log_decay = _log_decays(0.1, *shape)
    log_decay[:, :, 22] = -torch.inf
    b, c = torch.randn(shape).double(), torch.randn(shape).double()
    keys = torch.nn.functional.normalize(b, dim=-1)
    delta = DeltaRecurrence(log_decay, torch.rand(1, 2, 40).double(), keys, c)
    for operator in (DiagonalRecurrence(log_decay, b, c), ReadFirstRecurrence(log_decay, b, c), delta):
        assert_share(operator, operator.materialize(), 20, 1)
        far, total = far_share(operator, 20, 5)
        assert (far == 0).all()
        assert (total > 0).all()


@pytest.mark.parametrize("strength", [0.0, 0.05, 1.0, 30.0])
@pytest.mark.parametrize("length", [2, 9, 40, 130])
def test_delta_rules_have_the_norms_of_their_matrix(strength: float, length: int) -> None:
    keys = torch.nn.functional.normalize(torch.randn(2, 1, length, 6).double(), dim=-1)
    q = torch.randn(1, 3, length, 6).double()
    for decay_shape, beta_shape in itertools.product(
        ((2, 3, length, 6), (1, 3, length, 1), (1, 1, 1, 1)), ((2, 3, length), (1, 3, 1))
    ):
        log_decay, beta = _log_decays(strength, *decay_shape), torch.rand(beta_shape, dtype=torch.float64)
        operator = DeltaRecurrence(log_decay, beta, keys, q)
        T = reference.matrix_recurrence(reference.delta_rule(log_decay, beta, keys), beta[..., None] * keys, q)
        assert_share(operator, T, max(1, length // 2), length // 8 if length > 2 else 0)


def test_a_delta_rule_that_erases_everything_leaves_nothing_from_afar() -> None:
    key = torch.tensor([1.0, 0.0]).expand(1, 1, 40, 2)
    operator = DeltaRecurrence(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 40), key, key)
    assert far_share(operator, 20, 5).far_squared.item() < 1e-25


@pytest.mark.parametrize("length", [2, 17, 100])
@pytest.mark.parametrize("sharpness", [0.1, 3.0])
def test_attention_has_the_norms_of_its_matrix(length: int, sharpness: float) -> None:
    q, k = sharpness * torch.randn(2, 4, length, 8).double(), sharpness * torch.randn(1, 2, length, 8).double()
    window = torch.arange(length)[:, None] - torch.arange(length) < 11
    for mask in (None, window, torch.where(window, 0.0, -torch.inf).double() + torch.randn(length, length).double()):
        operator = SoftmaxAttention(q, k, mask=mask)
        assert_share(operator, reference.attention(q, k, mask=mask), length // 2 or 1, length // 8)


def test_sinks_take_their_part_of_every_row() -> None:
    q, k = torch.randn(2, 4, 30, 8), torch.randn(2, 4, 30, 8)
    for sinks in (torch.randn(1, 4, 1), torch.full((2, 4, 30), 40.0), torch.full((1, 1, 1), -torch.inf)):
        operator = SoftmaxAttention(q, k, sinks=sinks, softcap=5.0)
        assert_share(operator, operator.map(torch.Tensor.double).materialize(), 15, 3)


@pytest.mark.parametrize("taps", [1, 2, 5, 29, 30, 45])
def test_convolutions_have_the_norms_of_their_matrix(taps: int) -> None:
    kernel, b, c = (torch.randn(*shape).double() for shape in ((1, 3, taps), (2, 1, 30), (2, 3, 30)))
    for position, distance in ((15, 3), (1, 0), (29, 0), (10, 15)):
        assert_share(Convolution(kernel, 30), reference.convolution(kernel, 30), position, distance)
        gated = GatedConvolution(b, kernel, c)
        assert_share(gated, reference.convolution(kernel, 30, b, c), position, distance)


def test_nothing_above_the_diagonal_of_a_matrix_is_read() -> None:
    T = torch.randn(2, 3, 24, 24)
    dirty = torch.where(torch.ones(24, 24).bool().triu(4), torch.nan, T)
    assert_share(DenseOperator(dirty, block_size=4), T, 3, 1)


def test_rows_of_zeros_have_no_share() -> None:
    zeros = torch.zeros(1, 2, 16, 4)
    masked = SoftmaxAttention(zeros, zeros, mask=torch.zeros(16, 16, dtype=torch.bool))
    for operator in (DiagonalRecurrence(zeros[:, :, :1, :1], zeros, zeros), masked, Convolution(zeros[..., 0])):
        far, total = far_share(operator, 8, 2)
        assert (far == 0).all()
        assert (total == 0).all()


@pytest.mark.parametrize("mean", [1e-7, 1e-4, 1e-2, 1.0, 20.0])
def test_single_precision_over_thousands_of_tokens_is_as_good_as_the_inputs(mean: float) -> None:
    shape = (1, 2, 1200, 4)
    log_decay, b, c = -2 * mean * torch.rand(shape), torch.randn(shape), torch.randn(shape)
    T = DiagonalRecurrence(*(tensor.double() for tensor in (log_decay, b, c))).materialize()
    for dtype, error in ((torch.float32, 1e-9), (torch.bfloat16, None)):
        operator = DiagonalRecurrence(*(tensor.to(dtype) for tensor in (log_decay, b, c)))
        expected = T if error else operator.map(torch.Tensor.double).materialize()
        assert_share(operator, expected, 600, 150, error or 1e-9)
    keys = torch.nn.functional.normalize(b[:, :, :600], dim=-1)
    delta = DeltaRecurrence(log_decay[:, :, :600], torch.rand(1, 2, 600), keys, c[:, :, :600])
    assert_share(delta, delta.map(torch.Tensor.double).materialize(), 300, 75, 1e-8)


def test_cutting_the_work_into_slabs_changes_nothing(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = far_share(operator, 5, 2)
    monkeypatch.setattr(linalg, "SLAB_ELEMENTS", 7)
    for one, other in zip(whole, far_share(operator, 5, 2), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_operators_that_are_not_finite_spoil_their_own_share_only(operator: Operator) -> None:
    clean = far_share(operator, 6, 1)
    for index, field in enumerate(operator.tensors):
        spoiled = field.clone()
        spoiled[(-1,) * (spoiled.dim() - 1) + (0,)] = torch.nan  # of the last token, in the lower triangle
        replaced = iter([*operator.tensors[:index], spoiled, *operator.tensors[index + 1 :]])
        broken = operator.map(lambda _tensor, replaced=replaced: next(replaced))
        total, finite = far_share(broken, 6, 1).total_squared, broken.finite()
        torch.testing.assert_close(total[finite], clean.total_squared[finite], rtol=1e-12, atol=0)


def test_the_share_is_computed_without_a_look_at_any_value(operator: Operator) -> None:
    far, total = far_share(operator.map(lambda tensor: tensor.to("meta")), 6, 1)
    assert far.shape == total.shape == (SAMPLES, HEADS)
    assert far.device.type == total.device.type == "meta"


def test_inputs_keep_their_values_and_give_no_gradients(operator: Operator) -> None:
    operator = operator.map(lambda tensor: tensor.requires_grad_())
    before = [tensor.detach().clone() for tensor in operator.tensors]
    assert not far_share(operator, 6, 1).total_squared.requires_grad
    assert all(torch.equal(old, new) for old, new in zip(before, operator.tensors, strict=True))


@pytest.mark.parametrize(("position", "distance"), [(0, 1), (LENGTH, 0), (6, LENGTH - 6), (6, -1), (6, 1.5)])
def test_places_that_leave_no_row_are_refused(operator: Operator, position: int, distance: float) -> None:
    with pytest.raises(OperatorError, match=r"position|distance"):
        far_share(operator, position, distance)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_an_accelerator_gives_the_same_share(operator: Operator) -> None:
    far, total = far_share(operator, 6, 1)
    found = far_share(operator.map(lambda tensor: tensor.cuda()), 6, 1)
    torch.testing.assert_close(found.far_squared.cpu(), far, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.total_squared.cpu(), total, rtol=1e-10, atol=1e-14)
