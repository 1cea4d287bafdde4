"""T with gradients, against its definition and finite differences in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ess_monitor.ess import DiagonalRecurrence
from ess_monitor.ess.realization.matrix import differentiable_matrix


def recurrence(length: int, decay_shape: tuple[int, ...] = (2, 3, -1, 4)) -> DiagonalRecurrence:
    generator = torch.Generator().manual_seed(length)
    shape = tuple(length if size == -1 else size for size in decay_shape)
    log_decay = -torch.rand(shape, generator=generator, dtype=torch.float64)
    b, c = (torch.randn(2, 3, length, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return DiagonalRecurrence(log_decay, b, c)


def by_definition(given: DiagonalRecurrence) -> Tensor:
    decay = given.log_decay.exp().expand(2, 3, given.length, 4)
    T = torch.zeros(2, 3, given.length, given.length, dtype=torch.float64)
    for i in range(given.length):
        for j in range(i + 1):
            kept = decay[:, :, j + 1 : i + 1].prod(2)
            T[:, :, i, j] = (given.c[:, :, i] * kept * given.b[:, :, j]).sum(-1)
    return T


@pytest.mark.parametrize("length", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("decay_shape", [(2, 3, -1, 4), (1, 3, 1, 4), (2, 1, -1, 1), (1, 1, 1, 1)])
def test_it_is_the_operator(length: int, decay_shape: tuple[int, ...]) -> None:
    given = recurrence(length, decay_shape)
    torch.testing.assert_close(differentiable_matrix(given), by_definition(given), rtol=1e-12, atol=1e-14)


def test_its_gradients_are_those_of_finite_differences() -> None:
    given = recurrence(5)
    tensors = [each.requires_grad_() for each in (given.log_decay, given.b, given.c)]
    assert torch.autograd.gradcheck(lambda *each: differentiable_matrix(DiagonalRecurrence(*each)), tensors)


def test_a_decay_of_zero_cuts_the_sequence_and_has_finite_gradients() -> None:
    given = recurrence(6)
    given.log_decay[:, :, 3] = -torch.inf
    log_decay = given.log_decay.clone().requires_grad_()
    T = differentiable_matrix(DiagonalRecurrence(log_decay, given.b, given.c))
    torch.testing.assert_close(T.detach(), by_definition(given), rtol=1e-12, atol=1e-14)
    assert not T[..., 3:, :3].any()
    T.square().sum().backward()  # type: ignore[no-untyped-call]
    assert log_decay.grad is not None
    assert log_decay.grad.isfinite().all()
