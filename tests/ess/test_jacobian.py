"""The rank of a layer's Jacobian by products, against the singular values of the full Jacobian in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ess_monitor.errors import OperatorError
from ess_monitor.ess import DiagonalRecurrence, JacobianOperator
from ess_monitor.ess.products import JacobianProducts
from ess_monitor.featurizers.cores import diagonal_scan

Map = Callable[[Tensor], Tensor]


def full_jacobian(function: Map, inputs: Tensor) -> Tensor:
    """d y / d u of each sample, (batch, L E, L D), by torch's own loop over the outputs."""
    each = [torch.autograd.functional.jacobian(lambda u: function(u)[0], u[None])[:, :, 0] for u in inputs]
    return torch.stack([J.flatten(2).flatten(0, 1) for J in each])


def block(J: Tensor, position: int, length: int) -> Tensor:
    rows, columns = J.shape[1] // length, J.shape[2] // length
    return J[:, position * rows :, : position * columns]


def rnn(cls: type[nn.RNNBase], width: int = 6) -> Map:
    torch.manual_seed(0)
    layer = cls(width, width, batch_first=True).double()
    return lambda u: layer(u)[0]


def min_gru(u: Tensor) -> Tensor:
    """h_t = (1 - z_t) h_{t-1} + z_t W u_t with z_t = sigmoid(V u_t), as a loop."""
    torch.manual_seed(0)
    V, W = torch.randn(2, 6, 6, dtype=torch.float64)
    state, states = torch.zeros_like(u[:, 0]), []
    for token in u.unbind(1):
        gate = (token @ V).sigmoid()
        state = (1 - gate) * state + gate * (token @ W)
        states.append(state)
    return torch.stack(states, 1)


FUNCTIONS: dict[str, Map] = {
    "LSTM": rnn(nn.LSTM),
    "GRU": rnn(nn.GRU),
    "minGRU": min_gru,
    "logcumsumexp over a wide range": lambda u: (torch.logcumsumexp(30 * u, 1) / 30).exp(),
    "attention": lambda u: F.scaled_dot_product_attention(u[:, None], u[:, None], u[:, None], is_causal=True)[:, 0],
}


def inputs(batch: int = 2, length: int = 14, width: int = 6) -> Tensor:
    return torch.randn(batch, 1, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_singular_values_above_the_tolerance_are_those_of_the_full_jacobian(name: str) -> None:
    u = inputs()
    operator = JacobianOperator(u, FUNCTIONS[name], tolerance=1e-3)
    values = operator.singular_values([4, 7, 12])
    J = full_jacobian(FUNCTIONS[name], u[:, 0])
    torch.testing.assert_close(operator.materialize()[:, 0], J, rtol=1e-6, atol=1e-9)
    for p, i in enumerate((4, 7, 12)):
        expected = torch.linalg.svdvals(block(J, i, 14))
        count = (expected > 1e-3).sum(-1)
        assert operator.found[i].at_least(1e-3).tolist() == operator.found[i].at_most(1e-3).tolist() == count.tolist()
        found = values[:, 0, p, : expected.shape[1]]
        expected = expected[:, : found.shape[1]]
        torch.testing.assert_close(found[expected > 1e-3], expected[expected > 1e-3], rtol=1e-5, atol=1e-8)


def test_the_jacobian_of_the_op_alone_is_the_operator_once_a_channel() -> None:
    shape = (1, 1, 14, 4)
    q, k = torch.randn(2, *shape, dtype=torch.float64)
    log_decay = -0.3 * torch.rand(shape, dtype=torch.float64)
    v = torch.randn(1, 1, 14, 3, dtype=torch.float64)
    apart = JacobianOperator(v, lambda u: diagonal_scan(q, k, u[:, None], log_decay)[:, 0], tolerance=1e-6)
    expected = DiagonalRecurrence(log_decay, k, q).singular_values([5, 7])
    found = apart.singular_values([5, 7])[..., :12]
    torch.testing.assert_close(found, expected.repeat_interleave(3, -1), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("largest", [1, 20, 30])
def test_a_range_that_ends_too_early_gives_a_lower_bound_and_says_so(largest: int) -> None:
    operator = JacobianOperator(inputs(), lambda u: u.cumsum(1) + 0.1 * u.cumsum(1).sin(), tolerance=1e-6)
    operator.singular_values([7])
    true = operator.found[7].at_most(1e-6)
    short = JacobianOperator(inputs(width=40), lambda u: u.cumsum(1), tolerance=1e-6, largest=largest)
    short.singular_values([7])
    assert (short.found[7].at_least(1e-6) <= 40).all()
    assert short.found[7].at_most(1e-6).tolist() == [math.inf] * 2
    assert (true >= 6).all()


def test_the_rank_by_the_output_does_not_know_the_scale_of_the_output() -> None:
    function, u = rnn(nn.GRU), inputs()
    J = full_jacobian(function, u[:, 0]).unflatten(1, (14, 6))
    J = J / J.square().sum(-1).mean(-1).sqrt()[:, :, None, None]
    expected = torch.linalg.svdvals(block(J.flatten(1, 2), 7, 14))
    gap = expected[:, 5].min() / 3
    assert (expected[:, 6] < 1e-12).all(), "a GRU of width 6 carries six numbers"
    for scale in (1.0, 1e-6):
        operator = JacobianOperator(u, lambda u, scale=scale: scale * function(u), tolerance=float(gap))
        found = operator.with_unit_rows().singular_values([7])[:, 0, 0, :6]
        assert ((found > gap).sum(-1) == 6).all()
        torch.testing.assert_close(found, expected[:, :6], rtol=0.5, atol=0)  # norms are estimated
        assert operator.found[7].at_most(float(gap)).tolist() == [6.0, 6.0]


class _OnceDifferentiable(Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return u.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return gradient * (1 - u.tanh() ** 2)


class _WrongForwardMode(Function):
    factor = 25.0

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_forward(u)
        ctx.save_for_backward(u)
        return u.tanh()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return 25.0 * tangent * (1 - u.tanh() ** 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return gradient * (1 - u.tanh() ** 2)


@pytest.mark.parametrize(
    ("function", "method"),
    [
        (rnn(nn.GRU), "forward mode"),
        (lambda u: _WrongForwardMode.apply(u).cumsum(1), "double backward"),
        (lambda u: _OnceDifferentiable.apply(u).cumsum(1), "differences"),
    ],
)
def test_a_derivative_that_is_missing_or_wrong_is_replaced(function: Map, method: str) -> None:
    u = inputs()
    products = JacobianProducts(function, u[:, 0])
    assert products.method == method
    vector = torch.randn(1, *u[:, 0].shape, dtype=torch.float64)
    (image,) = products.forward(vector)
    J = full_jacobian(function, u[:, 0])
    expected = (J @ vector[0].flatten(1)[..., None]).squeeze(-1)
    torch.testing.assert_close(image.flatten(1), expected, rtol=1e-6, atol=1e-7)


class _WrongBackward(Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        return u * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 50


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda u: u.flip(1), "not causal: the outputs before token 7"),
        (lambda u: u.cumsum(1) + u.mean(0), "depend on the other sequences"),
        (lambda u: u + torch.rand_like(u), "differ from call to call"),
        (lambda u: u.detach() * 2, "its backward pass cannot be used"),
        (lambda u: _WrongBackward.apply(u), "does not agree with a difference"),
        (lambda u: u[:, ::2], "expected .batch, length, channels. of the same batch and length"),
        (lambda u: u / 0, "not finite"),
        (lambda u: None, "expected a floating tensor"),
        (lambda u: u @ u, "it does not run on its inputs again: RuntimeError"),
    ],
)
def test_what_cannot_be_linearized_says_why(function: Map, reason: str) -> None:
    with pytest.raises(OperatorError, match=reason):
        JacobianOperator(inputs(), function).singular_values([7])


def test_arguments_are_checked() -> None:
    with pytest.raises(OperatorError, match=r"expected \(batch, 1, length, D\) in float64 or float32"):
        JacobianOperator(torch.randn(1, 2, 5, 3), min_gru)
    with pytest.raises(OperatorError, match="largest"):
        JacobianOperator(inputs(), min_gru, largest=0)
