"""Memory decay, retention, and everything at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ess_monitor.errors import ConfigError, OperatorError
from ess_monitor.ess import (
    DenseOperator,
    DiagonalRecurrence,
    decay_product_norm,
    entropy_ess,
    mean_decay,
    measure,
    retention,
    retention_ratio,
    tolerance_ess,
)

SHAPE = (2, 3, 16, 4)


def _operator(log_decay: Tensor) -> DiagonalRecurrence:
    return DiagonalRecurrence(log_decay, torch.randn(SHAPE).double(), torch.randn(SHAPE).double())


@pytest.mark.parametrize("shape", [SHAPE, (1, 3, 1, 4), (1, 1, 1, 1), (2, 1, 16, 1)])
def test_the_size_of_the_product_of_transitions_is_that_of_the_matrices(shape: tuple[int, ...]) -> None:
    log_decay = -torch.rand(shape).double() * 0.2
    matrices = torch.diag_embed(log_decay.exp().expand(SHAPE))
    product = torch.eye(4).double().expand(2, 3, 4, 4)
    for t in range(16):
        product = matrices[:, :, t] @ product
    operator = _operator(log_decay)
    torch.testing.assert_close(decay_product_norm(operator), torch.linalg.matrix_norm(product))
    torch.testing.assert_close(mean_decay(operator), log_decay.exp().expand(SHAPE).mean((2, 3)))


def test_decays_of_exactly_zero_and_far_underflow_leave_a_product_of_zero() -> None:
    for value in (-torch.inf, -80.0):
        operator = DiagonalRecurrence(
            torch.full((1, 1, 1, 1), value), torch.ones(1, 1, 4000, 2), torch.ones(1, 1, 4000, 2)
        )
        assert decay_product_norm(operator).item() == 0.0
        assert mean_decay(operator).item() < 1e-30


def test_half_precision_decays_are_averaged_in_single_precision() -> None:
    log_decay = torch.full((1, 1, 4096, 1), -1e-3, dtype=torch.bfloat16)
    features = torch.ones(1, 1, 4096, 1, dtype=torch.bfloat16)
    operator = DiagonalRecurrence(log_decay, features, features)
    exact = log_decay.double()
    torch.testing.assert_close(mean_decay(operator), exact.exp().mean((2, 3)).float())
    torch.testing.assert_close(decay_product_norm(operator), exact.sum((2, 3)).exp().float())


def test_operators_without_transitions_have_no_decay_and_keep_everything() -> None:
    operator = DenseOperator(torch.randn(2, 3, 8, 8))
    assert decay_product_norm(operator) is None
    assert mean_decay(operator) is None
    assert torch.equal(retention(operator, [2, 4]), torch.ones(2, 3, 2))
    measured = measure(operator, [4])
    assert measured.undecayed_ess is measured.mean_decay is measured.decay_product_norm is None


def test_retention_is_low_where_the_decay_costs_memory_and_one_where_it_does_not() -> None:
    strong, none = torch.full((1, 1, 1, 1), -6.0), torch.zeros(1, 1, 1, 1)
    assert (retention(_operator(strong), [8]) < 0.8).all()
    assert torch.equal(retention(_operator(none), [8]), torch.ones(2, 3, 1).double())


def test_retention_is_defined_where_nothing_is_left() -> None:
    ess = torch.tensor([2.0, 0.0, 0.0, 3.0, torch.nan, 0.0])
    undecayed = torch.tensor([4.0, 4.0, 0.0, 0.0, 2.0, torch.nan])
    ratio = retention_ratio(ess, undecayed)
    assert ratio[:4].tolist() == [0.5, 0.0, 1.0, 3.0]
    assert ratio[4:].isnan().all()


def test_measuring_gives_what_the_single_functions_give() -> None:
    operator = _operator(-torch.rand(SHAPE).double())
    positions = (4, 8, 12)
    measured = measure(operator, positions, tolerance=0.1)
    values = operator.singular_values(positions)
    undecayed = operator.without_decay().singular_values(positions)
    assert torch.equal(measured.tolerance_ess, tolerance_ess(values, 0.1))
    assert torch.equal(measured.entropy_ess, entropy_ess(measured.singular_values))
    torch.testing.assert_close(measured.entropy_ess, entropy_ess(values), rtol=1e-5, atol=0)
    assert torch.equal(measured.undecayed_ess, tolerance_ess(undecayed, 0.1))
    assert torch.equal(measured.mean_decay, mean_decay(operator))
    assert torch.equal(measured.decay_product_norm, decay_product_norm(operator))
    assert torch.equal(measured.state_capacity, torch.full((3,), 4.0))
    assert measured.finite.all()


def test_retention_can_be_left_out() -> None:
    assert measure(_operator(torch.zeros(1, 1, 1, 1)), [8], retention=False).undecayed_ess is None


def test_one_token_measures_nothing_and_raises_nothing() -> None:
    operator = _operator(torch.zeros(1, 1, 1, 1)).select(length=1)
    measured = measure(operator, ())
    assert measured.tolerance_ess.shape == measured.undecayed_ess.shape == (2, 3, 0)
    assert measured.finite.all()


def test_measurements_that_require_gradients_have_none() -> None:
    operator = _operator(torch.zeros(1, 1, 1, 1)).map(lambda tensor: tensor.requires_grad_())
    measured = measure(operator, [8], far_share_at=(8, 2))
    assert measured.far_share is not None
    tensors = [value for value in (*vars(measured).values(), *measured.far_share) if isinstance(value, torch.Tensor)]
    assert len(tensors) == len(vars(measured)) + 1
    assert not any(tensor.requires_grad for tensor in tensors)


def test_arguments_that_make_no_sense_are_refused() -> None:
    operator = _operator(torch.zeros(1, 1, 1, 1))
    with pytest.raises(ConfigError, match="tolerance=-1"):
        measure(operator, [8], tolerance=-1)
    with pytest.raises(OperatorError, match="position 16"):
        measure(operator, [16])
