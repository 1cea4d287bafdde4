"""The diagonal scan against a loop over time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ess_monitor.errors import OperatorError
from ess_monitor.featurizers import diagonal_scan
from tests.featurizers.helpers import recurrence

LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 65, 100)
B, H, N = 2, 3, 5
DECAY_SHAPES = {
    "per token and state": (B, H, None, N),
    "scalar per token": (B, H, None, 1),
    "shared by the heads": (B, 1, None, N),
    "fixed per head and state": (1, H, 1, N),
    "fixed, one for all": (1, 1, 1, 1),
    "fixed per sample": (B, H, 1, N),
    "per token, shared by the batch": (1, H, None, 1),
    "none": None,
}


def features(length: int, values: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(B, H, length, size, dtype=dtype) for size in (N, N, values)]


def decays(shape: tuple[int | None, ...] | None, length: int, dtype: torch.dtype = torch.float64) -> Tensor | None:
    if shape is None:
        return None
    return -2 * torch.rand([length if size is None else size for size in shape], dtype=dtype)


@pytest.mark.parametrize("values", [1, 4])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", DECAY_SHAPES)
def test_equals_the_recurrence_at_every_length_and_kind_of_decay(kind: str, length: int, values: int) -> None:
    q, k, v = features(length, values)
    log_decay = decays(DECAY_SHAPES[kind], length)
    torch.testing.assert_close(diagonal_scan(q, k, v, log_decay), recurrence(q, k, v, log_decay), rtol=0, atol=1e-12)


@pytest.mark.parametrize("values", [1, 4])
@pytest.mark.parametrize("length", [3, 33, 70])
@pytest.mark.parametrize("kind", DECAY_SHAPES)
def test_gradients_equal_those_of_the_recurrence(kind: str, length: int, values: int) -> None:
    log_decay = decays(DECAY_SHAPES[kind], length)
    arguments = [x.requires_grad_() for x in (*features(length, values), log_decay) if x is not None]
    weight = torch.randn(B, H, length, values, dtype=torch.float64)
    rest = [None] if log_decay is None else []
    found = torch.autograd.grad((diagonal_scan(*arguments, *rest) * weight).sum(), arguments)
    expected = torch.autograd.grad((recurrence(*arguments, *rest) * weight).sum(), arguments)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("values", [1, 2])
@pytest.mark.parametrize("shape", [(1, 2, 5, 3), (1, 2, 1, 3), (1, 2, 5, 1), None])
def test_gradients_agree_with_finite_differences(shape: tuple[int, ...] | None, values: int) -> None:
    def new(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, requires_grad=True)

    inputs = [new(1, 2, 5, 3), new(1, 2, 5, 3), new(1, 2, 5, values)]
    if shape is None:
        assert torch.autograd.gradcheck(lambda *x: diagonal_scan(*x, None), inputs)
    else:
        log_decay = (-torch.rand(shape, dtype=torch.float64)).requires_grad_()
        assert torch.autograd.gradcheck(diagonal_scan, [*inputs, log_decay])


@pytest.mark.parametrize("values", [1, 4])
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("strength", [1e-8, 80.0, 1e4, 1e30, float("inf")])
def test_stays_exact_and_finite_under_extreme_decay(strength: float, fixed: bool, values: int) -> None:
    length = 75
    q, k, v = (x.requires_grad_() for x in features(length, values, torch.float32))
    shape = (1, H, 1, N) if fixed else (B, H, length, N)
    strong = torch.rand(shape) < 0.5
    log_decay = torch.where(strong, -strength, -0.01 * torch.rand(shape)).requires_grad_()
    y = diagonal_scan(q, k, v, log_decay)
    expected = recurrence(*(x.detach().double() for x in (q, k, v, log_decay)))
    torch.testing.assert_close(y.detach().double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    for gradient in torch.autograd.grad(y.sum(), (q, k, v, log_decay)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("values", [1, 4])
def test_keeps_long_memories_after_a_strong_decay_elsewhere(values: int) -> None:
    # Cumulated decays would reach -1e6 here, where float32 has steps of 0.06: differences of them lose the 1e-3 below.
    length = 90
    q, k, v = (torch.ones(1, 1, length, size) for size in (1, 1, values))
    log_decay = torch.full((1, 1, length, 1), -1e-3)
    log_decay[:, :, :40] = -3e4
    y = diagonal_scan(q, k, v, log_decay)
    age = torch.arange(51, dtype=torch.float64)
    expected = torch.exp(-1e-3 * age).sum()
    torch.testing.assert_close(y[0, 0, -1], expected.float().expand(values), rtol=1e-6, atol=0)


def test_half_precision_is_computed_in_float32() -> None:
    length = 64
    q, k, v = features(length, 4, torch.float32)
    log_decay = -1e-3 * torch.rand(B, H, length, N)
    half = [x.bfloat16() for x in (q, k, v, log_decay)]
    y = diagonal_scan(*half)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, diagonal_scan(*(x.float() for x in half)).bfloat16())


def test_autocast_does_not_lower_the_precision() -> None:
    q, k, v = features(40, 4, torch.float32)
    log_decay = decays((B, H, None, N), 40, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = diagonal_scan(q, k, v, log_decay)
    assert torch.equal(inside, diagonal_scan(q, k, v, log_decay))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 4), (2, 3, 4), (2, 3, 4), None), r"q has shape \(2, 3, 4\), expected \(batch, heads, length, state\)"),
        (((1, 2, 0, 4), (1, 2, 0, 4), (1, 2, 0, 4), None), "none of them empty"),
        (((1, 2, 6, 4), (1, 1, 6, 4), (1, 2, 6, 4), None), r"k has shape \(1, 1, 6, 4\).*expand"),
        (((1, 2, 6, 4), (1, 2, 6, 4), (1, 2, 5, 4), None), r"v has shape \(1, 2, 5, 4\)"),
        (((1, 2, 6, 4), (1, 2, 6, 4), (1, 2, 6, 4), (1, 3, 6, 4)), r"log_decay has shape \(1, 3, 6, 4\).*None for no"),
        (((1, 2, 6, 4), (1, 2, 6, 4), (1, 2, 6, 4), (2, 1)), r"log_decay has shape \(2, 1\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...] | None, ...], message: str) -> None:
    with pytest.raises(OperatorError, match=message):
        diagonal_scan(*(None if shape is None else torch.zeros(shape) for shape in shapes))
