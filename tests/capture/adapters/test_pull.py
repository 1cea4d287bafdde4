"""What interventions do to the layers of libraries: the regularizer's gradients, and the exactness of alpha."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.layers import CASES, Case
from ess_monitor.capture import CaptureConfig, Captured, DecayHandle, Layer, Sampler, Transition, find_layers
from ess_monitor.ess import DeltaRecurrence, DiagonalRecurrence, Operator
from ess_monitor.interventions import IdentityPull, collect_penalties, rescale_alpha
from ess_monitor.interventions.identity_pull import transition_penalty

STRENGTH = 0.5
PULLED = [pytest.param(case, id=case.name) for case in CASES if "train" in case.modes and case.pulled]
SCALED = [pytest.param(case, id=case.name) for case in CASES if case.scaled]


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library, about its own options
        yield


def built(case: Case) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], list[Layer]]:
    pytest.importorskip(case.package)
    with torch.random.fork_rng(devices=()), quietly():
        torch.manual_seed(0)
        model, args, kwargs = case.build()
    layers = [layer for layer in find_layers(model) if type(layer.module).__name__ == case.layer]
    return model.train(), args, kwargs, layers


def loss_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    with torch.random.fork_rng(devices=()), quietly():
        torch.manual_seed(1)
        output = model(*args, **kwargs)
    first = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    assert isinstance(first, Tensor)
    return (first.float() * torch.linspace(-1, 1, first.shape[-1])).square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def own_transition(operator: Operator) -> Transition:
    """A as the captured operator has it."""
    if isinstance(operator, DiagonalRecurrence):
        return Transition(operator.log_decay, state_size=operator.state_size)
    assert isinstance(operator, DeltaRecurrence)
    steps = operator.transitions.steps(lambda tensor: tensor)
    return Transition(operator.log_decay, steps.left, steps.right, state_size=operator.state_size)


@pytest.mark.parametrize("case", PULLED)
def test_the_pull_gives_the_gradients_of_the_added_term_on_every_parameter(case: Case) -> None:
    model, args, kwargs, layers = built(case)
    with collect_penalties(model, [layers[-1].name]) as penalties:
        loss = loss_of(model, args, kwargs)
    penalty = penalties.total()
    (loss + STRENGTH * penalty).backward()
    expected = gradients(model)
    loss_of(model, args, kwargs).backward()
    bare = gradients(model)

    handle = layers[-1].spec.decay
    assert isinstance(handle, DecayHandle)
    pull = IdentityPull(layers[-1].module, handle, STRENGTH)
    pull.attach()
    loss_of(model, args, kwargs).backward()
    pull.detach()
    found = gradients(model)
    assert found.keys() == expected.keys()
    moved = False
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp_min(1e-8)
        assert (found[name] - gradient).abs().max() <= 2e-5 * scale, name
        moved |= name in bare and bool((bare[name] - gradient).abs().max() > 1e-3 * scale)
    assert moved, "the term has no weight here, so that equality would mean nothing"
    behind = [name for name, _ in layers[-1].module.named_parameters() if name.startswith(handle.parameters)]
    assert {name.split(".")[0] for name in behind} >= {name.split(".")[0] for name in handle.parameters}


@pytest.mark.parametrize("case", PULLED)
def test_the_penalty_is_that_of_the_captured_operator(case: Case) -> None:
    model, args, kwargs, layers = built(case)
    sampler = Sampler((layers[-1],), CaptureConfig(samples=2**31, heads=None, max_length=None))
    sampler.arm(any_pass=True)
    with collect_penalties(model, [layers[-1].name]) as penalties:
        loss_of(model, args, kwargs)
    [captured] = sampler.collect()
    assert isinstance(captured, Captured)
    of_operator = transition_penalty(own_transition(captured.operator))
    torch.testing.assert_close(penalties.total().double(), of_operator.double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", SCALED)
def test_alpha_divides_the_log_decay_by_its_factor(case: Case) -> None:
    model, args, kwargs, layers = built(case)
    model.eval()

    def log_decay() -> Tensor:
        sampler = Sampler((layers[0],), CaptureConfig(samples=2**31, heads=None, max_length=None, source="validation"))
        sampler.arm()
        with torch.no_grad(), quietly():
            model(*args, **kwargs)
        [captured] = sampler.collect()
        assert isinstance(captured, Captured), captured
        return captured.operator.log_decay.double()  # type: ignore[attr-defined]

    before = log_decay()
    assert before.abs().max() > 0
    rescale_alpha(layers[0].module, 8.0, handle=layers[0].spec.alpha)
    torch.testing.assert_close(log_decay() * 8, before, rtol=1e-5, atol=1e-7)
