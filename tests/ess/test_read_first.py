"""A state that is read before it is updated, against a plain loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ess_monitor.ess import ReadFirstRecurrence


def read_first(log_decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """T written down from its definition."""
    length = b.shape[0]
    T = torch.zeros(length, length, dtype=torch.float64)
    for i in range(length):
        for j in range(i):
            T[i, j] = (c[i] * log_decay[j + 1 : i].sum(0).exp() * b[j]).sum()
    return T


@pytest.mark.parametrize("strength", [0.1, 5.0, 50.0, 1000.0])
def test_a_state_that_is_read_first_is_exact_for_any_decay(strength: float) -> None:
    b, c = torch.randn(2, 12, 4, dtype=torch.float64)
    log_decay = -strength * torch.rand(12, 4, dtype=torch.float64)
    operator = ReadFirstRecurrence(*(tensor[None, None] for tensor in (log_decay, b, c)))
    T = read_first(log_decay, b, c)
    torch.testing.assert_close(operator.materialize()[0, 0], T, rtol=1e-12, atol=1e-14)
    for i in (1, 4, 6, 11):
        expected = torch.linalg.svdvals(T[i:, :i])[:4]
        found = operator.singular_values([i])[0, 0, 0, : len(expected)]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13 * expected[0].item())
    without = operator.without_decay().materialize()[0, 0].tril(-1)
    torch.testing.assert_close(without, read_first(0 * log_decay, b, c))


def test_a_separated_sequence_is_not_even_read_from_at_its_first_token() -> None:
    b, c = torch.randn(2, 1, 1, 8, 4)
    log_decay = -torch.rand(1, 1, 8, 4)
    log_decay[:, :, 5] = -math.inf
    T = ReadFirstRecurrence(log_decay, b, c).materialize()
    assert (T[..., 5:, :5] == 0).all()
    assert T[..., 6, 5].item() != 0
