"""Layers of papers, written small, as people write them for themselves. None imports a library."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.census.item import Built, Item

WIDTH, LENGTH = 16, 48


class MinGRU(nn.Module):
    """h_t = (1 - z_t) h_{t-1} + z_t x_t, by a scan in log space (Feng et al., 2024)."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_and_gate = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.hidden_and_gate(x).chunk(2, -1)
        log_keep = F.logsigmoid(-gate).cumsum(1)
        return (log_keep + torch.logcumsumexp(F.logsigmoid(gate) + F.softplus(hidden).log() - log_keep, 1)).exp()


class MLSTMCell(nn.Module):
    """Matrix memory with exponential gates, in its parallel form (Beck et al., 2024)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.gates = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        write, keep = self.gates(x).unbind(-1)
        total = F.logsigmoid(keep).cumsum(1)
        logits = (total[:, :, None] - total[:, None, :] + write[:, None, :]).masked_fill(_later(x), -torch.inf)
        weights = (q @ k.mT) * (logits - logits.amax(-1, keepdim=True)).exp()
        return weights @ v / weights.sum(-1, keepdim=True).abs().clamp(min=1)


class TTTLinear(nn.Module):
    """A linear model that is trained on the tokens, one step for each (Sun et al., 2024)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weight, outputs = x.new_zeros(len(x), WIDTH, WIDTH), []
        q, k, v = self.q(x), F.normalize(self.k(x), dim=-1), self.v(x)
        for t in range(x.shape[1]):
            error = torch.einsum("bij,bj->bi", weight, k[:, t]) - v[:, t]
            weight = weight - torch.einsum("bi,bj->bij", error, k[:, t])
            outputs.append(torch.einsum("bij,bj->bi", weight, q[:, t]))
        return torch.stack(outputs, 1)


class NeuralMemory(nn.Module):
    """As above, its steps taken by `vmap(grad(...))` (Behrouz et al., 2025)."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v, self.weight = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.eye(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        def loss(weight: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (k @ weight - v).square().sum()

        keys, values = self.k(x), self.v(x)
        steps = torch.func.vmap(torch.func.vmap(torch.func.grad(loss), (None, 0, 0)), (None, 0, 0))
        weights = self.weight - 0.01 * steps(self.weight, keys, values).cumsum(1)
        return (keys[:, :, None] @ weights).squeeze(2)


class S4DKernel(nn.Module):
    """The kernel of a diagonal state-space model."""

    def __init__(self) -> None:
        super().__init__()
        self.log_rate, self.c = nn.Parameter(torch.randn(WIDTH, 4)), nn.Parameter(torch.randn(WIDTH, 4))

    def forward(self, length: int) -> Tensor:
        powers = torch.exp(-self.log_rate.exp()[..., None] * torch.arange(length))
        return (self.c[..., None] * powers).sum(1)


class S4D(nn.Module):
    """A convolution with that kernel (Gu et al., 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = S4DKernel()

    def forward(self, x: Tensor) -> Tensor:
        return _long_convolution(x.mT, self.kernel(x.shape[1])).mT


class HyenaFilter(nn.Module):
    """An implicit filter, applied by FFT."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return _long_convolution(x, self.filter(torch.linspace(0, 1, x.shape[2])[:, None]).mT)


class HyenaOperator(nn.Module):
    """Two gates around an implicit filter (Poli et al., 2023)."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.short = nn.Linear(WIDTH, 3 * WIDTH), nn.Conv1d(3 * WIDTH, 3 * WIDTH, 3, 1, 2, 1, 3 * WIDTH)
        self.filter_fn = HyenaFilter()

    def forward(self, x: Tensor) -> Tensor:
        a, b, v = self.short(self.into(x).mT)[..., : x.shape[1]].chunk(3, 1)
        return (a * self.filter_fn(b * v)).mT


class MultiHeadEMA(nn.Module):
    """Damped moving averages (Ma et al., 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.delta = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        decay = 1 - self.alpha.sigmoid() * self.delta.sigmoid()
        return _long_convolution(x.mT, self.alpha.sigmoid()[:, None] * decay[:, None] ** torch.arange(x.shape[1])).mT


class SRU(nn.Module):
    """A light recurrence (Lei et al., 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        value, keep, read = self.into(x).chunk(3, -1)
        state, outputs = torch.zeros_like(x[:, 0]), []
        for u, f, r, skip in zip(
            value.unbind(1), keep.sigmoid().unbind(1), read.sigmoid().unbind(1), x.unbind(1), strict=True
        ):
            state = f * state + (1 - f) * u
            outputs.append(r * state + (1 - r) * skip)
        return torch.stack(outputs, 1)


class LoopOverCells(nn.Module):
    """`nn.LSTMCell` in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = (x.new_zeros(len(x), WIDTH),) * 2, []
        for t in range(x.size(1)):
            state = self.cell(x[:, t], state)
            outputs.append(state[0])
        return torch.stack(outputs, 1)


class QKNormAttention(nn.Module):
    """Attention by hand, with normed queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 8
        return scores.masked_fill(_later(x), -torch.inf).softmax(-1) @ v


class KernelAttention(nn.Module):
    """Linear attention with a feature map, by running sums (Katharopoulos et al., 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        memory = torch.einsum("bld,ble->blde", k, v).cumsum(1)
        return torch.einsum("bld,blde->ble", q, memory) / (q * k.cumsum(1)).sum(-1, keepdim=True)


class FourierMixing(nn.Module):
    """FNet's (Lee-Thorp et al., 2021): it looks ahead."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(x).real


class SpatialGate(nn.Module):
    """gMLP's gate: a linear layer over the tokens (Liu et al., 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(LENGTH, LENGTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mix(x)


class TokenShift(nn.Module):
    """RWKV's: a part of the channels comes from the token before."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.ratio = nn.ZeroPad2d((0, 0, 1, -1)), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.ratio + self.shift(x) * (1 - self.ratio)


class AttentionFree(nn.Module):
    """AFT-full (Zhai et al., 2021): weights of positions, and none of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.position = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.randn(LENGTH, LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = self.position.masked_fill(_later(x), -torch.inf).exp()
        return q.sigmoid() * (weights @ (k.exp() * v)) / (weights @ k.exp())


class TemporalConvolution(nn.Module):
    """A dilated causal convolution in a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.pad(x.mT, (4, 0))).mT


class GatedMLP(nn.Module):
    """No mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class SoftExperts(nn.Module):
    """No mixer: all experts for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.choice, self.weight = nn.Linear(WIDTH, 4), nn.Parameter(torch.randn(4, WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ble,blef->blf", self.choice(x).softmax(-1), torch.einsum("bld,edf->blef", x, self.weight))


LAYERS = (
    *(MinGRU, MLSTMCell, TTTLinear, NeuralMemory, S4D, HyenaOperator, MultiHeadEMA, SRU, LoopOverCells),
    *(QKNormAttention, KernelAttention, FourierMixing, SpatialGate, TokenShift, AttentionFree, TemporalConvolution),
    *(GatedMLP, SoftExperts, partial(nn.LSTM, WIDTH, WIDTH, batch_first=True), partial(nn.GRU, WIDTH, WIDTH)),
    partial(nn.TransformerEncoderLayer, WIDTH, 2, 32, batch_first=True),
)


def items() -> Iterator[Item]:
    """Yield each layer between two others."""
    for layer in LAYERS:
        name = layer.func.__name__ if isinstance(layer, partial) else layer.__name__
        yield Item("written small", name, partial(_built, layer))


def _built(layer: type[nn.Module]) -> Built:
    return Built(_Chain(layer()), ((torch.randn(2, LENGTH, WIDTH),), {}))


class _Chain(nn.Module):
    """A norm, a mixer, and a projection: what is called like a mixer must be found inside of it."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner, self.out = nn.LayerNorm(WIDTH), mixer, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.inner(self.norm(x))
        projected: Tensor = self.out(mixed[0] if isinstance(mixed, tuple) else mixed)
        return projected


def _later(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)


def _long_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    size = 2 * x.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(x, size) * torch.fft.rfft(kernel, size), size)[..., : x.shape[-1]]
