"""Mixers of an unknown kind are found by what their code does."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor import describe
from ess_monitor.featurizers import GLA

WIDTH = 8


class Wide(nn.Module):
    """Two projections, so that the layers below have parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)


class ByScan(Wide):
    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.into(x).chunk(2, -1)
        log_gate = F.logsigmoid(gate).cumsum(1)
        return self.out(log_gate.exp() * (value / log_gate.exp()).cumsum(1))


class ByFourier(Wide):
    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x, 2 * x.shape[1], 1) * torch.fft.rfft(x, 2 * x.shape[1], 1)
        return torch.fft.irfft(spectrum, 2 * x.shape[1], 1)[:, : x.shape[1]]


class ByAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transform = functools.partial(torch.fft.fftn, dim=(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(x).real


class ByCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        state, outputs = (x.new_zeros(batch, width),) * 2, []
        for t in range(length):
            state = self.cell(x[:, t], state)
            outputs.append(state[0])
        return torch.stack(outputs, 1)


class ByUnbind(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        state, outputs = torch.zeros_like(x[:, 0]), []
        for token in x.unbind(1):
            state = 0.5 * state + token
            outputs.append(state)
        return torch.stack(outputs, 1)


class ByProducts(Wide):
    """Linear attention by hand."""

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.into(x).chunk(2, -1)
        return torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", x, k).tril(), v)


class ByHand(Wide):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2)).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.into(x).chunk(2, -1)
        return self.scores(x, k) @ v


class ByConvolution(Wide):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(F.pad(x.mT, (3, 0)), torch.ones(WIDTH, 1, 4), groups=WIDTH).mT


class ByFunctionBeside(Wide):
    def forward(self, x: Tensor) -> Tensor:
        return _scanned(self.into(x))


def _scanned(x: Tensor) -> Tensor:
    return x.cumsum(1)


class ByWhile(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        t, state, outputs = 0, torch.zeros_like(x[:, 0]), []
        while t < x.shape[1]:
            state = 0.5 * state + x[:, t]
            outputs.append(state)
            t += 1
        return torch.stack(outputs, 1)


class ByOwnState(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.state, outputs = torch.zeros_like(x[:, 0]), []
        for _, token in enumerate(x.transpose(0, 1)):
            self.state = 0.5 * self.state + token
            outputs.append(self.state)
        return torch.stack(outputs, 1)


class ByZip(nn.Module):
    def forward(this, x: Tensor) -> Tensor:
        state, outputs = torch.zeros_like(x[:, 0]), []
        for token, gate in zip(x.unbind(1), x.sigmoid().unbind(1), strict=True):
            state = gate * state + token
            outputs.append(state)
        return torch.stack(outputs, 1)


class ByAccumulate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(list(itertools.accumulate(x.unbind(1), lambda a, b: 0.5 * a + b)), 1)


class ByRoll(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.roll(x, 1, 1)


class BySwitch(nn.Module):
    """Has an attribute of the name of the operation that it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.roll, self.conv1d = True, nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(self.conv1d(x.mT).mT, 1, 1) if self.roll else x


class ByOwnConvolution(nn.Module):
    """A convolution of a kind of one's own, under the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d = Taps(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1d(x)


class Taps(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1))


MIXERS = (
    BySwitch,
    ByOwnConvolution,
    ByWhile,
    ByOwnState,
    ByZip,
    ByAccumulate,
    ByRoll,
    ByScan,
    ByFourier,
    ByAttribute,
    ByCell,
    ByUnbind,
    ByProducts,
    ByHand,
    ByConvolution,
    ByFunctionBeside,
)


class LowRank(nn.Module):
    """Products with its own parameters mix no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.ones(2, WIDTH)), nn.Parameter(torch.ones(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down.T @ self.up.transpose(0, 1)


class ParametersOnly(nn.Module):
    def __init__(this) -> None:
        super().__init__()
        this.weight = nn.Parameter(torch.eye(WIDTH))

    def forward(this, x: Tensor) -> Tensor:
        return x @ (this.weight @ this.weight.T)


class FeatureParts(nn.Module):
    """A loop over parts of the features carries no state from token to token."""

    def forward(self, x: Tensor) -> Tensor:
        total = 0
        for part in x.chunk(2, -1):
            total = total + part
        return total


class Deep(nn.Module):
    """A loop over layers is none over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        for k in range(len(self.parts)):
            x = self.parts[k](x)
        return x


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.weight = nn.Linear(WIDTH, 2), nn.Parameter(torch.ones(2, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        return torch.einsum("ble,bled->bld", shares, torch.einsum("bld,edf->blef", x, self.weight))


class PointwiseConvolution(nn.Module):
    """A linear layer that is written as a convolution over one token, as in SqueezeBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d, self.act = nn.Conv1d(WIDTH, WIDTH, 1, groups=2), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv1d(x.mT)).mT


class HoldsPointwise(nn.Module):
    """Names of operations that stand for other things: modules that treat tokens alone, a switch, a number."""

    def __init__(self) -> None:
        super().__init__()
        self.causal_conv1d = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout())
        self.short_conv1d = PointwiseConvolution()
        self.accumulate, self.scan = False, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        parts = [layer(x) for layer in (self.causal_conv1d, self.short_conv1d)]
        return self.scan * (x if self.accumulate else sum(parts))


@pytest.mark.parametrize("kind", MIXERS)
def test_a_mixer_is_found_by_its_code_whatever_it_is_called(kind: type[nn.Module]) -> None:
    net = nn.Sequential(GLA(WIDTH, 2), nn.Sequential(nn.LayerNorm(WIDTH), kind()))
    [gla, info] = describe(net).layers
    assert (gla.supported, info.name, info.module, info.supported) == (True, "1.1", kind.__name__, False)
    nonlinear = kind is ByCell
    assert ("nonlinear recurrence" if nonlinear else f"register_capture({kind.__name__})") in info.reason


@pytest.mark.parametrize(
    "kind", [LowRank, Deep, Experts, ParametersOnly, FeatureParts, PointwiseConvolution, HoldsPointwise]
)
def test_what_treats_each_token_by_itself_is_not_listed(kind: type[nn.Module]) -> None:
    assert not describe(nn.Sequential(kind())).layers
