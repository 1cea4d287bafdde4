"""What a sample of 48 layers of each kind costs at the default settings, and what there is no time for.

    python -m benchmarks.sample_cost [--json FILE]

Seconds are those of one core. The estimate follows from shapes alone. The measured figure is 48 times that of one
layer: processor time of everything that is measured of an operator with random tensors. The plan of the samples, and
the interval that 1 % of the training time gives, follow from it as in a run. An estimate that is off by more than a
factor of four fails.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.report import Result, main
from ess_monitor import MonitorConfig
from ess_monitor.capture import Captured
from ess_monitor.capture.layers import Layer
from ess_monitor.ess import DeltaRecurrence, DiagonalRecurrence, Operator, SoftmaxAttention
from ess_monitor.ess.cost import SampleShape, state_of
from ess_monitor.pipeline.readings import compute
from ess_monitor.runtime.turns import LayerTurns

LAYERS = [f"layers.{k}.mixer" for k in range(48)]
CONFIG = MonitorConfig()
SIZE = (CONFIG.capture.samples, CONFIG.capture.heads or 1, 1024)
BUDGET = 0.01
MOST_OFF = 4.0


def _random(*dimensions: int) -> Tensor:
    return torch.randn(*SIZE, *dimensions, generator=torch.Generator().manual_seed(0))


def _gated(state: int) -> Operator:
    return DiagonalRecurrence(-0.05 * _random(state).abs(), _random(state) / state**0.5, _random(state) / state**0.5)


def _mamba2(state: int) -> Operator:
    return DiagonalRecurrence(-0.05 * _random(1).abs(), _random(state) / state**0.5, _random(state) / state**0.5)


def _delta(state: int) -> Operator:
    keys = torch.nn.functional.normalize(_random(state), dim=-1)
    return DeltaRecurrence(-0.05 * _random(1).abs(), _random().sigmoid(), keys, _random(state) / state**0.5)


def _attention(state: int) -> Operator:
    return SoftmaxAttention(_random(state), _random(state))


KINDS: dict[str, tuple[Callable[[int], Operator], int]] = {
    "GLA, n 16": (_gated, 16),
    "GLA, n 64": (_gated, 64),
    "Mamba-2, n 128": (_mamba2, 128),
    "delta rule, n 64": (_delta, 64),
    "delta rule, n 128": (_delta, 128),
    "softmax attention, d 64": (_attention, 64),
}


def captured(operator: Operator) -> Captured:
    """Return the operator as of a layer in a sample."""
    layer = cast(Layer, SimpleNamespace(name="mixer", module=None))
    return Captured(layer, operator, heads=(), channels=operator.heads, length=operator.length)


def row_of(name: str) -> tuple[dict[str, Any], float]:
    """Return the row of a kind, and how many times as long as estimated it took."""
    build, state = KINDS[name]
    operator = build(state)
    shape = SampleShape(type(operator).__name__, state_of(operator), *SIZE, CONFIG.positions)
    started = time.thread_time()
    compute(captured(operator), CONFIG.positions, CONFIG.tolerance)
    seconds = time.thread_time() - started
    size = sum(tensor.numel() * tensor.element_size() for tensor in operator.tensors)
    taken = second_sample(shape, seconds / shape.seconds)
    return {
        "48 layers": name,
        "estimated s": len(LAYERS) * shape.seconds,
        "measured s": len(LAYERS) * seconds,
        "MiB of all": len(LAYERS) * size / 2**20,
        "layers of a sample": taken,
        "left out": len(LAYERS) - taken,
        "s of a sample": taken * seconds,
        "MiB of a sample": taken * size / 2**20,
        "interval at 1 %, s": taken * seconds / BUDGET,
        "each layer every, s": taken * seconds / BUDGET * -(-len(LAYERS) // taken),
    }, seconds / shape.seconds


def second_sample(shape: SampleShape, slowness: float) -> int:
    """Return how many layers are in a sample, once the first one was timed."""
    turns = LayerTurns(LAYERS, CONFIG.runtime.sample_seconds)
    for step in range(2):
        taken = [name for name in turns.choose(LAYERS) if turns.fit(name, shape)]
        turns.observe(step, dict.fromkeys(taken, slowness))
    return len(taken)


def run() -> Result:
    """Measure every kind."""
    torch.set_num_threads(1)
    compute(captured(_gated(16)), CONFIG.positions, CONFIG.tolerance)  # loads libraries
    found = {name: row_of(name) for name in KINDS}
    failures = [
        f"{name}: took {ratio:.2f} times as long as estimated"
        for name, (_, ratio) in found.items()
        if not 1 / MOST_OFF < ratio < MOST_OFF
    ]
    title = f"A sample of {len(LAYERS)} layers, at most {CONFIG.runtime.sample_seconds:g} s, of 1024 tokens"
    return Result(title, [row for row, _ in found.values()], failures=failures)


if __name__ == "__main__":
    sys.exit(main([run], __doc__))
