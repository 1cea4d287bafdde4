"""The tolerance against what a layer puts out: T with rows of norm 1, against the matrix in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ess_monitor.errors import ConfigError
from ess_monitor.ess import (
    Convolution,
    DeltaRecurrence,
    DenseOperator,
    DiagonalRecurrence,
    GatedConvolution,
    Operator,
    ReadFirstRecurrence,
    SoftmaxAttention,
    measure,
)
from tests.ess import reference
from tests.ess.kinds import HEADS, KINDS, LENGTH, SAMPLES

POSITIONS = tuple(range(1, LENGTH))


@pytest.fixture(params=KINDS)
def operator(request: pytest.FixtureRequest) -> Operator:
    return KINDS[request.param]()


def unit_rows(T: Tensor, block_size: int = 1) -> Tensor:
    """Each token's rows divided by the root mean square of their norms, by the definition."""
    T = T.double().clone()
    for token in range(T.shape[-1] // block_size):
        rows = slice(block_size * token, block_size * (token + 1))
        T[..., rows, rows.stop :] = 0.0
        norm = T[..., rows, :].square().sum((-2, -1), keepdim=True).div(block_size).sqrt()
        T[..., rows, :] = torch.where(norm > 0, T[..., rows, :] / norm, 0.0)
    return T


def test_every_kind_has_the_singular_values_of_its_matrix_with_unit_rows(operator: Operator) -> None:
    expected = unit_rows(operator.materialize(), operator.block_size)
    reference.assert_agrees(operator.with_unit_rows(), expected, error=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e4])
def test_the_size_by_the_output_does_not_know_the_scale_of_any_row(operator: Operator, scale: float) -> None:
    T = operator.materialize()
    d, factors = operator.block_size, scale * (1 + torch.rand(LENGTH, dtype=torch.float64))
    scaled = DenseOperator(T * factors.repeat_interleave(d)[:, None], d)
    found = measure(scaled, POSITIONS, tolerance=0.1, tolerance_scale="output")
    for p, i in enumerate(POSITIONS):
        values = reference.singular_values(unit_rows(T, d), i, d)
        assert ((values - 0.1).abs() > 1e-9).all()
        assert torch.equal(found.tolerance_ess[:, :, p], (values > 0.1).sum(-1).double())


def test_a_measurement_by_the_output_is_that_of_the_matrix_and_of_the_one_without_decay(operator: Operator) -> None:
    found = measure(operator, POSITIONS, tolerance=0.3, tolerance_scale="output")
    absolute = measure(operator, POSITIONS, tolerance=0.3)
    undecayed = operator.without_decay()
    assert (found.undecayed_ess is None) == (undecayed is None)
    for p, i in enumerate(POSITIONS):
        for matrix, sizes in ((operator, found.tolerance_ess), (undecayed, found.undecayed_ess)):
            if matrix is not None and sizes is not None:
                d = matrix.block_size
                values = reference.singular_values(unit_rows(matrix.materialize(), d), i, d)
                assert torch.equal(sizes[:, :, p].double(), (values > 0.3).sum(-1).double())
    for name in ("mean_decay", "decay_product_norm", "state_capacity", "finite"):
        torch.testing.assert_close(getattr(found, name), getattr(absolute, name), rtol=0, atol=0)


def _operators(dtype: torch.dtype, length: int) -> list[Operator]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    shape = (2, 3, length, 4)
    keys = torch.nn.functional.normalize(torch.randn(shape), dim=-1).to(dtype)
    decay = -torch.rand(shape).to(dtype).masked_fill(torch.rand(shape) < 0.02, torch.inf)
    return [
        DiagonalRecurrence(decay, 1e-3 * randn(*shape), 1e-3 * randn(1, 3, length, 4)),
        DiagonalRecurrence(decay[:1, :1, :1, :1], randn(2, 1, length, 4), randn(*shape)),
        ReadFirstRecurrence(decay, randn(*shape), randn(*shape)),
        DeltaRecurrence(decay[..., :1], torch.rand(2, 3, length).to(dtype), keys, randn(*shape)),
        SoftmaxAttention(randn(*shape), randn(2, 1, length, 4), sinks=randn(1, 3, 1)),
        Convolution(randn(1, 3, 5), length),
        GatedConvolution(randn(2, 1, length), randn(1, 3, length), randn(2, 3, length)),
        DenseOperator(randn(2, 3, length, length)),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [2, 97, 150])
def test_inputs_of_low_precision_are_divided_in_float64(dtype: torch.dtype, length: int) -> None:
    positions = sorted({1, length // 2, length - 1})
    for operator in _operators(dtype, length):
        exact = operator.map(lambda tensor: tensor.double())
        expected = unit_rows(exact.materialize())
        found = operator.with_unit_rows()
        reference.assert_agrees(
            found, expected, positions=positions, error=1e-6 if found.result_dtype == torch.float32 else 1e-8
        )
        assert measure(operator, positions, tolerance_scale="output").singular_values.dtype == torch.float32


def test_rows_of_zeros_stay_and_what_is_not_finite_stays_in_its_operator() -> None:
    b, c = torch.randn(1, 2, 6, 3).double(), torch.randn(1, 2, 6, 3).double()
    b[:, :, :2], c[:, :, 4] = 0.0, 0.0
    c[0, 1, 5, 0] = torch.inf
    decay = torch.zeros(1, 1, 1, 1).double()
    found = measure(DiagonalRecurrence(decay, b, c), [3], tolerance=0.0, tolerance_scale="output")
    assert found.finite.tolist() == [[True, False]]
    assert found.tolerance_ess[0, 0].item() == 1  # one column that is not 0
    assert found.tolerance_ess[0, 1].isnan().all()
    hidden = torch.tensor([[[[False, True], [False, False]]]])
    attention = SoftmaxAttention(torch.randn(1, 1, 2, 3), torch.randn(1, 1, 2, 3), mask=hidden)
    assert attention.with_unit_rows().materialize().eq(0).all()


def test_an_unknown_scale_is_refused() -> None:
    T = DenseOperator(torch.ones(SAMPLES, HEADS, 3, 3))
    with pytest.raises(ConfigError, match="tolerance_scale='relative' must be one of absolute, output"):
        measure(T, [1], tolerance_scale="relative")  # type: ignore[arg-type]
