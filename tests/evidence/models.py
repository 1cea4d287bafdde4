"""Small models, each with a state of its own kind that a forward pass changes."""

from __future__ import annotations

import random
import warnings
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 6


class Around(nn.Module):
    """A linear layer before and after something, and dropout at the end where asked for."""

    def __init__(self, inner: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(WIDTH, WIDTH), inner, nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(self.inner(self.first(x))))


class Counting(nn.Module):
    """Counts in tensors as a metric does, in numbers, in what lists, dicts and deques hold, and in arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.in_place = torch.zeros(WIDTH)
        self.rebound = torch.zeros(())
        self.calls, self.mean, self.last, self.started = 0, 0.0, "none", False
        self.total: float | None = None
        self.seen: list[Tensor] = []
        self.recent: deque[float] = deque(maxlen=3)
        self.histogram: Counter[str] = Counter()
        self.shadow = {"weights": {"mean": torch.zeros(WIDTH)}}
        self.shapes: set[int] = set()
        self.array = np.zeros(WIDTH)
        self.ring = [(torch.zeros(WIDTH), torch.zeros(WIDTH))]

    def forward(self, x: Tensor) -> Tensor:
        value = x.detach().mean(0)
        self.in_place += value
        self.rebound = self.rebound + value.sum()
        self.calls += 1
        self.mean = float(self.rebound) / self.calls
        self.last, self.started = f"call {self.calls}", True
        self.total = (self.total or 0.0) + self.mean
        self.seen.append(value)
        self.recent.append(self.mean)
        self.histogram["high" if self.mean > 0 else "low"] += 1
        self.shadow["weights"]["mean"].lerp_(value, 0.1)
        self.shapes.add(self.calls)
        self.array += value.numpy()
        self.ring[0][1].copy_(value)
        self.late = self.calls
        # What was counted is used, so that a wrong count would be trained on.
        scale = 1 + 0.01 * (self.calls % 7 + self.rebound.tanh() + self.shadow["weights"]["mean"].mean())
        return x * scale


class Augmenting(nn.Module):
    """Draws from Python's and NumPy's generators, global and held."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.legacy, self.python = np.random.default_rng(1), np.random.RandomState(2), random.Random(3)

    def forward(self, x: Tensor) -> Tensor:
        drawn = random.random() + self.own.random() + self.legacy.rand() + self.python.random()
        drawn += np.random.rand()  # noqa: NPY002
        return x * (1 + 0.1 * drawn)


class Noisy(nn.Module):
    """Draws from a generator that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(7)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn(x.shape, generator=self.generator)


class Caching(nn.Module):
    """Sets itself up from the first batch that it is called with, and makes a table longer when a batch needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("positions", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "cache"):
            self.cache = x.detach().mean(0)
            self.helper = nn.Linear(WIDTH, WIDTH)
        if len(self.positions) <= len(x):
            self.positions = torch.arange(len(self.positions) + len(x) + 1.0)
        return x * self.scale + 0.01 * self.cache + 0.01 * self.positions[-1]


class Averaging(nn.Module):
    """Moves buffers: in place, bound to another tensor, on other memory, outside the state_dict, by views."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(WIDTH))
        self.register_buffer("rebound", torch.zeros(WIDTH))
        self.register_buffer("moved", torch.zeros(WIDTH))
        self.register_buffer("hidden", torch.zeros(WIDTH), persistent=False)
        self.register_buffer("wide", torch.zeros(1).expand(WIDTH))
        self.register_buffer("nothing", None)
        self.corner = self.average[2:]

    def forward(self, x: Tensor) -> Tensor:
        value = x.detach().mean(0)
        self.average.lerp_(value, 0.1)
        self.corner.mul_(0.9)
        self.rebound = self.rebound + value
        self.moved.data = torch.cat([self.moved, value])[-WIDTH - 1 :]
        self.hidden.data.add_(value)  # no version of the tensor tells of it
        self.wide[:1].add_(1)
        self.nothing = value.clone()
        return x - 0.1 * (self.average + self.rebound.tanh() + self.hidden + self.moved[-1]) - 0.001 * self.wide


class Unregistered(nn.Module):
    """Holds modules in a list, out of `modules()`."""

    def __init__(self) -> None:
        super().__init__()
        self.teachers = [nn.BatchNorm1d(WIDTH)]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.teachers[0](x).detach()


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.dropout(self.one(x)).relu())


class Checkpointed(nn.Module):
    """Recomputes two layers, with dropout and a counter in them, in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3), nn.BatchNorm1d(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """An LSTM, which holds its weights in lists of its own too."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=0.3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.lstm(x[:, None])[0][:, 0]
        return found


class Metrics(nn.Module):
    """Metrics of torchmetrics inside a model."""

    def __init__(self) -> None:
        super().__init__()
        from torchmetrics import CatMetric, MeanMetric
        from torchmetrics.regression import MeanSquaredError

        self.mean, self.error, self.all = MeanMetric(), MeanSquaredError(), CatMetric()

    def forward(self, x: Tensor) -> Tensor:
        value = x.detach()
        self.error.update(value, value * 0.9)
        self.all.update(value.mean())
        return x * (1 + 0.01 * self.mean(value))  # type: ignore[no-any-return]


def spectral() -> nn.Module:
    """Both spectral norms of torch."""
    return nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    )


def weight_norms() -> nn.Module:
    """Both weight norms of torch: the older one computes an attribute in each forward pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))
    return nn.Sequential(old, nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: Around(nn.Identity(), dropout=0.3),
    "batch norm": lambda: Around(nn.BatchNorm1d(WIDTH)),
    "spectral norm": lambda: Around(spectral()),
    "weight norm": lambda: Around(weight_norms()),
    "counting": lambda: Around(Counting()),
    "torchmetrics": lambda: Around(Metrics()),
    "augmenting": lambda: Around(Augmenting()),
    "held generator": lambda: Around(Noisy()),
    "cache built late": lambda: Around(Caching()),
    "moving buffers": lambda: Around(Averaging()),
    "modules in a list": lambda: Around(Unregistered()),
    "tied weights": Tied,
    "checkpointing": lambda: Around(Checkpointed(reentrant=False)),
    "reentrant checkpointing": lambda: Around(Checkpointed(reentrant=True)),
    "lstm": lambda: Around(Recurrent()),
}


class Language(nn.Module):
    """A model of tokens, with dropout behind it."""

    def __init__(self, net: nn.Module, **options: Any) -> None:
        super().__init__()
        self.net, self.options, self.dropout = net, options, nn.Dropout(0.2)

    def forward(self, tokens: Tensor) -> Tensor:
        output = self.net(tokens, **self.options)
        return self.dropout(output if isinstance(output, Tensor) else output.logits)


def transformers_model(name: str) -> nn.Module:
    """A small model of transformers that fills a cache of keys and values, or of states."""
    from benchmarks.layers.mamba import hf

    sizes = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "attention_dropout": 0.2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net, _, _ = hf(name, **(sizes if name == "Llama" else {"state_size": 4}))
    return Language(net, use_cache=True)


def featurizer(name: str) -> nn.Module:
    """A small net of ours."""
    from ess_monitor.featurizers import Backbone, BackboneConfig

    return Language(Backbone(BackboneConfig(vocab_size=32, width=8, num_heads=2, state_size=4, featurizer=name)))
