"""Mamba-2's ops on packed sequences: none sees the one before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ess_monitor.capture import Transition, find_layers
from ess_monitor.interventions import collect_penalties
from ess_monitor.interventions.identity_pull import transition_penalty
from tests.capture.adapters.helpers import captured_in, check_pull, exact

SEGMENTS = torch.tensor([[0] * 5 + [1] * 8 + [2] * 11, [0] * 24], dtype=torch.int32)
HEADS, WIDTH, STATE = 2, 3, 4


def scan_by_token(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, bias: Tensor, limits: tuple[float, float]
) -> Tensor:
    """Mamba-2's recurrence with one group; a new sequence starts from nothing."""
    delta, state, ys = nn.functional.softplus(dt + bias).clamp(*limits), x.new_zeros(()), []
    for t in range(x.shape[1]):
        goes_on = SEGMENTS[:, t] == SEGMENTS[:, max(t - 1, 0)]
        decay = (delta[:, t] * A).exp() * goes_on[:, None]
        state = decay[..., None, None] * state + (delta[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        ys.append((state * C[:, t, :, None]).sum(-1))
    return torch.stack(ys, 1)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    dt_bias: Tensor,
    seq_idx: Tensor,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> Tensor:
    """The op."""
    return scan_by_token(x, dt, A, B, C, dt_bias, dt_limit)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    seq_idx: Tensor,
    dt_limit: tuple[float, float],
    activation: str = "silu",
    headdim: int = WIDTH,
    ngroups: int = 1,
) -> Tensor:
    """The fused op, without skip, gate, norm and projection."""
    inner = HEADS * WIDTH
    _, xBC, dt = zxbcdt.split((inner, inner + 2 * STATE, HEADS), 2)
    x, B, C = convolved(xBC, conv1d_weight, conv1d_bias).split((inner, STATE, STATE), 2)
    return scan_by_token(x.unflatten(2, (HEADS, WIDTH)), dt, A, B[:, :, None], C[:, :, None], dt_bias, dt_limit)


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One sequence after the other."""
    result = torch.empty_like(x)
    for row, ids in enumerate(SEGMENTS):
        for k in ids.unique():
            y = nn.functional.conv1d(x[row, ids == k].T, weight[:, None], bias, padding=3, groups=len(weight))
            result[row, ids == k] = nn.functional.silu(y[:, :-3]).T
    return result


class Packed(nn.Module):
    """A layer of somebody's own that calls an op of mamba_ssm's name on packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.d_state = HEADS, STATE
        self.A_log, self.dt_bias = nn.Parameter(torch.randn(HEADS)), nn.Parameter(torch.randn(HEADS))
        self.weight, self.bias = nn.Parameter(torch.randn(14, 4)), nn.Parameter(torch.randn(14))

    def forward(self, x: Tensor, *, fused: bool) -> Tensor:
        A, limit = -self.A_log.exp(), (0.05, 2.0)
        if fused:
            return mamba_split_conv1d_scan_combined(
                x, self.weight, self.bias, self.dt_bias, A, A, 8, SEGMENTS, limit, headdim=WIDTH
            )
        u, B, C = convolved(x[..., 6:20], self.weight, self.bias).split((6, STATE, STATE), 2)
        return mamba_chunk_scan_combined(
            u.unflatten(2, (HEADS, WIDTH)),
            x[..., 20:],
            A,
            B[:, :, None],
            C[:, :, None],
            8,
            self.dt_bias,
            SEGMENTS,
            True,
            limit,
        )


@pytest.mark.parametrize("fused", [False, True])
def test_packed_sequences_do_not_see_each_other(fused: bool) -> None:
    layer, x = Packed(), torch.randn(2, 24, 6 + 14 + HEADS)
    [taken] = captured_in(layer, lambda: layer(x, fused=fused))
    operator = exact(taken.operator)
    assert operator[0].abs().max() > 0
    assert (operator[0] * (SEGMENTS[0, :, None] != SEGMENTS[0])).abs().max() == 0
    with torch.no_grad():
        u = convolved(x[..., 6:20], layer.weight, layer.bias)[..., :6].unflatten(2, (HEADS, WIDTH))
        y = layer(x, fused=fused).transpose(1, 2).double()
    assert (operator @ u.transpose(1, 2).double() - y).abs().max() < 1e-5 * y.abs().max()


@pytest.mark.parametrize("fused", [False, True])
def test_the_penalty_on_packed_sequences_is_that_of_their_operator(fused: bool) -> None:
    layer, x = Packed(), torch.randn(2, 24, 6 + 14 + HEADS)
    with torch.no_grad(), collect_penalties(layer) as penalties:
        [taken] = captured_in(layer, lambda: layer(x, fused=fused))
    operator: Any = taken.operator
    of_operator = transition_penalty(Transition(operator.log_decay, state_size=STATE))
    torch.testing.assert_close(penalties.total().double(), of_operator, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_the_pull_works_on_packed_sequences(fused: bool, in_small_parts: None) -> None:
    layer, x = Packed(), torch.randn(2, 24, 6 + 14 + HEADS)
    assert check_pull(layer, find_layers(layer)[0], lambda: layer(x, fused=fused).square().mean()) >= {
        "A_log",
        "dt_bias",
    }
