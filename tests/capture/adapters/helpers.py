"""What the tests of the adapters share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ess_monitor.capture import CaptureConfig, Captured, Layer, Sampler, find_layers
from ess_monitor.ess import Operator
from ess_monitor.interventions import IdentityPull, collect_penalties

EVERYTHING = CaptureConfig(samples=2**31, heads=None, max_length=None, source="validation")
STRENGTH = 0.5


def captured_in(model: nn.Module, run: Callable[[], Any]) -> list[Captured]:
    sampler = Sampler(find_layers(model), EVERYTHING)
    sampler.arm()
    with torch.no_grad():
        run()
    taken = sampler.collect()
    assert all(isinstance(item, Captured) for item in taken), taken
    return list(taken)  # type: ignore[arg-type]


def exact(operator: Operator) -> Tensor:
    return operator.map(lambda tensor: tensor.double()).materialize()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def check_pull(model: nn.Module, layer: Layer, loss: Callable[[], Tensor]) -> set[str]:
    """The gradients of the pull are those of the added term; returns the layer's parameters that it moves."""
    with collect_penalties(model, [layer.name]) as penalties:
        bare_loss = loss()
    expected = gradients(model, bare_loss + STRENGTH * penalties.total())
    bare = gradients(model, loss())
    assert layer.spec.decay is not None
    pull = IdentityPull(layer.module, layer.spec.decay, STRENGTH)
    pull.attach()
    found = gradients(model, loss())
    pull.detach()
    moved = set()
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp_min(1e-8)
        assert (found[name] - gradient).abs().max() <= 2e-5 * scale, name
        if name not in bare or (bare[name] - gradient).abs().max() > 1e-3 * scale:
            moved.add(name)
    return {name for name, p in layer.module.named_parameters() if any(p is model.get_parameter(m) for m in moved)}
