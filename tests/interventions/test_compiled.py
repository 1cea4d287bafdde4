"""The regularizer in a compiled model, attached after the first compiled call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from benchmarks.layers.mamba import hf
from ess_monitor.capture import find_layers
from ess_monitor.errors import CaptureError
from ess_monitor.featurizers import GLA
from ess_monitor.interventions import IdentityPull, collect_penalties

Loss = Callable[[Any], Tensor]

pytestmark = pytest.mark.filterwarnings("ignore")
"""Of the compiler, about itself."""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def module_site(layers: int = 2) -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(GLA(16, 2) for _ in range(layers))), torch.randn(2, 4, 16)
    return model, lambda called: called(x).square().sum()


def op_site(layers: int = 1) -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)
    model, (tokens,), kwargs = hf("Mamba", state_size=4, num_hidden_layers=layers)
    short = tokens[:1, :3]  # the compiler writes the scan out, token by token
    return model.train(), lambda called: called(short, **kwargs).logits.square().sum()


def compiled(model: nn.Module, how: str) -> Any:
    if how == "whole":
        return torch.compile(model, backend="eager" if hasattr(model, "config") else "aot_eager", fullgraph=True)
    if how == "in place":
        model.compile(backend="eager")
    else:
        for layer in find_layers(model):
            layer.module.compile(backend="eager")
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("make", "layers", "how"),
    [
        (module_site, 1, "whole"),
        (module_site, 2, "in place"),
        (module_site, 2, "each layer"),
        (op_site, 1, "whole"),
        (op_site, 1, "each layer"),
    ],
)
def test_gradients_are_those_of_the_added_term_and_the_compiler_is_left_as_it_was(
    make: Callable[[int], tuple[nn.Module, Loss]], layers: int, how: str
) -> None:
    model, loss = make(layers)
    layer = find_layers(model)[-1]
    bare = (loss(model).backward(), gradients(model))[1]
    with collect_penalties(model, [layer.name]) as penalties:
        value = loss(model)
    (value + 0.5 * penalties.total()).backward()
    expected = gradients(model)
    called = compiled(model, how)
    loss(called).backward()
    gradients(model)
    config = torch._dynamo.config
    setting = config.skip_nnmodule_hook_guards

    assert layer.spec.decay is not None
    pull = IdentityPull(layer.module, layer.spec.decay, 0.5)
    pull.attach()
    for _ in range(2):
        loss(called).backward()
        found = gradients(model)
        assert max(((found[n] - e).norm() / e.norm().clamp_min(1e-9)).item() for n, e in expected.items()) < 1e-5
    pull.detach()
    assert config.skip_nnmodule_hook_guards == setting
    loss(called).backward()
    after = gradients(model)
    assert max(((after[n] - e).norm() / e.norm().clamp_min(1e-9)).item() for n, e in bare.items()) < 1e-5


def test_a_penalty_of_compiled_layers_is_an_error_and_the_way_out_that_it_names_gives_all_of_it() -> None:
    """Half of it in silence would be another training."""
    model, loss = module_site()
    with collect_penalties(model) as expected:
        loss(model)
    model[0].compile(backend="eager")
    with torch.compiler.set_stance("default"):  # also where another test left a monitor armed
        loss(model)
        with collect_penalties(model) as penalties:
            loss(model)
    with pytest.raises(CaptureError, match=r"\['0'\] not seen.*IdentityPull.*set_stance\(\"force_eager\"\)"):
        penalties.total()
    with collect_penalties(model) as penalties, torch.compiler.set_stance("force_eager"):
        loss(model)
    assert torch.equal(penalties.total(), expected.total())
    penalties.total().backward()
    found = gradients(model)
    expected.total().backward()
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients(model).items())


@pytest.mark.parametrize("make", [module_site, op_site])
def test_a_model_is_not_compiled_again_at_every_step_while_the_regularizer_is_attached(
    make: Callable[[int], tuple[nn.Module, Loss]],
) -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        forward: Callable[..., Any] = graph.forward
        return forward

    model, loss = make(1)
    (layer,) = find_layers(model)
    called = torch.compile(model, backend=count, fullgraph=True)
    assert layer.spec.decay is not None
    pull = IdentityPull(layer.module, layer.spec.decay, 0.5)
    pull.attach()
    loss(called).backward()
    first = graphs
    for _ in range(3):
        loss(called).backward()
    assert graphs == first
    pull.detach()
