"""A complex diagonal recurrence against its own loop in complex128."""

from __future__ import annotations

import pytest
import torch

from ess_monitor import OperatorError
from ess_monitor.ess import DiagonalRecurrence, ReadFirstRecurrence, complex_recurrence

BATCH, HEADS, LENGTH, STATE = 2, 3, 20, 4


def complex_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.complex128)


def by_loop(log_decay: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """T by the response to each unit input."""
    full = (BATCH, HEADS, LENGTH, STATE)
    decay, b, c = log_decay.exp().expand(full), b.expand(full), c.expand(full)
    T = torch.zeros(BATCH, HEADS, LENGTH, LENGTH, dtype=torch.float64)
    for j in range(LENGTH):
        state = torch.zeros(BATCH, HEADS, STATE, dtype=torch.complex128)
        for t in range(j, LENGTH):
            state = decay[:, :, t] * state + (b[:, :, t] if t == j else 0)
            T[:, :, t, j] = (c[:, :, t] * state).sum(-1).real
    return T


@pytest.mark.parametrize("fixed", [False, True])
def test_the_operator_and_its_singular_values_are_those_of_the_complex_loop(fixed: bool) -> None:
    torch.manual_seed(0)
    log_decay = complex_of(1, HEADS, 1 if fixed else LENGTH, STATE)
    log_decay = -log_decay.real.abs() * 0.2 + 1j * log_decay.imag
    b, c = complex_of(BATCH, 1, LENGTH, STATE), complex_of(1, HEADS, LENGTH, STATE)
    operator, T = complex_recurrence(log_decay, b, c), by_loop(log_decay, b, c)
    torch.testing.assert_close(operator.materialize(), T)
    assert operator.state_capacity([5]).tolist() == [2 * STATE]
    values = operator.singular_values([10])[:, :, 0]
    torch.testing.assert_close(values, torch.linalg.svdvals(T[:, :, 10:, :10])[..., : 2 * STATE], rtol=1e-8, atol=1e-10)


def test_real_tensors_are_a_real_recurrence() -> None:
    log_decay, b, c = -torch.rand(1, 1, 1, 2), torch.randn(1, 1, 6, 2), torch.randn(1, 1, 6, 2)
    lag = (torch.arange(6)[:, None] - torch.arange(6))[..., None]
    T = (c[0, 0][:, None] * (log_decay[0, 0] * lag).exp() * b[0, 0][None]).sum(-1).tril()
    torch.testing.assert_close(complex_recurrence(log_decay, b, c).materialize()[0, 0], T)


def test_a_real_recurrence_names_the_function_for_complex_tensors() -> None:
    real, turning = torch.ones(1, 1, 6, 2), torch.ones(1, 1, 6, 2) * 1j
    for given in ((turning, real, real), (0 * real, turning, real), (0 * real, real, turning)):
        with pytest.raises(OperatorError, match=r"complex64.*complex_recurrence\(log_decay, b, c\)"):
            DiagonalRecurrence(*given)
        assert complex_recurrence(*given).state_size == 4
    with pytest.raises(OperatorError, match=r"log_decay has dtype torch\.complex64; pass a real"):
        ReadFirstRecurrence(turning, real, real)


@pytest.mark.parametrize("wrong", [torch.ones(1, 2, 3), torch.ones(1, 1, 6, 3), None])
def test_what_does_not_fit_is_told(wrong: object) -> None:
    with pytest.raises(OperatorError, match="log_decay"):
        complex_recurrence(wrong, torch.ones(1, 1, 6, 2), torch.ones(1, 1, 6, 2))  # type: ignore[arg-type]
