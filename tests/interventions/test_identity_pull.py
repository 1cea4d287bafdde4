"""The norm against its definition, at the edges too, and an `IdentityPull` that comes and goes without a trace."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ess_monitor.capture import layer_infos
from ess_monitor.capture.hooks.call_site import Call
from ess_monitor.errors import ConfigError
from ess_monitor.interventions import add_penalty_gradient, identity_penalty
from tests.interventions.helpers import (
    DECAYING,
    backbone,
    batch,
    gradients,
    last_layer,
    pull_on,
    task_loss,
    watched_decay,
    written_out_penalty,
)

INF = math.inf


def naive_penalty(log_decay: Tensor) -> float:
    """Entry by entry, in float64."""
    samples, heads, length, state = log_decay.shape
    norms = []
    for b in range(samples):
        for t in range(length):
            squares = [(1 - math.exp(log_decay[b, h, t, n].item())) ** 2 for h in range(heads) for n in range(state)]
            norms.append(math.sqrt(sum(squares)))
    return sum(norms) / len(norms)


def all_hooks(model: nn.Module) -> list[Any]:
    return [
        hook
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks)
        for hook in hooks.values()
    ]


# -- the norm ---------------------------------------------------------------------------------------------------------


@given(shape=st.tuples(*[st.integers(1, 4)] * 4), scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_penalty_equals_its_definition_entry_by_entry(shape: tuple[int, ...], scale: float) -> None:
    log_decay = -scale * torch.rand(shape)
    assert identity_penalty(log_decay).item() == pytest.approx(naive_penalty(log_decay.double()), rel=1e-5)
    assert identity_penalty(log_decay.double()).item() == pytest.approx(naive_penalty(log_decay.double()), rel=1e-12)


@pytest.mark.parametrize("repeats", [(4, 1, 1, 1), (1, 1, 4, 1), (2, 1, 3, 1)], ids=["batch", "length", "both"])
def test_penalty_and_its_pull_on_a_gate_do_not_grow_with_batch_or_length(repeats: tuple[int, ...]) -> None:
    gate = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)

    def value_and_gradient(log_decay: Tensor) -> tuple[Tensor, Tensor]:
        penalty = identity_penalty(log_decay)
        return penalty, torch.autograd.grad(penalty, gate)[0]

    once = value_and_gradient(nn.functional.logsigmoid(gate))
    tiled = value_and_gradient(nn.functional.logsigmoid(gate).repeat(repeats))
    torch.testing.assert_close(tiled, once, rtol=1e-12, atol=0)


def test_a_decay_without_batch_and_length_counts_like_the_expanded_one() -> None:
    log_decay = -torch.rand(1, 2, 1, 4)
    expanded = identity_penalty(log_decay.expand(3, 2, 7, 4))
    assert identity_penalty(log_decay).item() == pytest.approx(expanded.item(), rel=1e-6)


def injected_gradient(log_decay: Tensor) -> Tensor:
    leaf = log_decay.clone().requires_grad_()
    add_penalty_gradient(leaf, 1.0).mul(0).nan_to_num().sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def added_gradient(log_decay: Tensor) -> Tensor:
    leaf = log_decay.clone().requires_grad_()
    identity_penalty(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("gradient", [injected_gradient, added_gradient])
def test_at_the_identity_the_penalty_is_zero_and_pulls_nowhere(gradient: Any) -> None:
    identity = torch.zeros(2, 2, 3, 4)
    assert identity_penalty(identity).item() == 0
    assert torch.equal(gradient(identity), identity)


@pytest.mark.parametrize("gradient", [injected_gradient, added_gradient])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_extreme_decays_give_finite_penalties_and_gradients(gradient: Any, dtype: torch.dtype) -> None:
    extremes = torch.tensor([0.0, -1e-8, -1e-4, -1.0, -1e4, -INF], dtype=dtype).reshape(1, 1, -1, 1)
    assert identity_penalty(extremes[:, :, -2:]).item() == 1
    assert gradient(extremes).isfinite().all()
    assert gradient(extremes)[0, 0, -2:].flatten().tolist() == [0, 0]  # nothing pulls a decay that is fully closed


@given(scale=st.sampled_from([1e-5, 1e-3, 1.0, 30.0]), strength=st.floats(1e-3, 1e3))
def test_injected_gradient_is_that_of_the_definition(scale: float, strength: float) -> None:
    leaf = (-scale * torch.rand(2, 2, 3, 4, dtype=torch.float64)).requires_grad_()
    [expected] = torch.autograd.grad(strength * written_out_penalty(leaf), leaf)
    weights = torch.randn_like(leaf)
    (add_penalty_gradient(leaf, strength) * weights).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad - weights, expected, rtol=1e-9, atol=1e-11 * max(1.0, strength))


def test_a_half_precision_decay_is_penalized_in_float32() -> None:
    assert identity_penalty(torch.full((1, 1, 2, 2), -0.1, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_decay_that_needs_no_gradient_is_handed_back_as_it_is() -> None:
    log_decay = -torch.rand(1, 1, 2, 2)
    assert add_penalty_gradient(log_decay, 1.0) is log_decay


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (1, 2, 3, 4, 5)])
def test_a_decay_of_another_shape_is_an_error_that_names_the_axes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"log_decay has shape .* \(batch, heads, length, state\)"):
        identity_penalty(torch.zeros(shape))


# -- on a layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("featurizer", DECAYING)
def test_output_is_bitwise_the_same_with_the_pull_attached(featurizer: str) -> None:
    model, (tokens, _) = backbone(featurizer), batch(0)
    expected = model(tokens)
    pull_on(model).attach()
    assert torch.equal(model(tokens), expected)
    with torch.no_grad():
        assert torch.equal(model(tokens), expected)
    assert torch.equal(model.eval()(tokens), expected)


@pytest.mark.parametrize("featurizer", DECAYING)
def test_in_evaluation_mode_gradients_are_those_of_the_model_alone(featurizer: str) -> None:
    model = backbone(featurizer).eval()
    task_loss(model, batch(0)).backward()
    expected = gradients(model)
    pull_on(model).attach()
    task_loss(model, batch(0)).backward()
    assert all(map(torch.equal, gradients(model), expected))


def test_without_gradients_the_pull_leaves_no_graph_behind() -> None:
    model, (tokens, _) = backbone("gla"), batch(0)
    pull_on(model).attach()
    with torch.no_grad(), watched_decay(model) as seen:
        assert not model(tokens).requires_grad
    assert seen[0].grad_fn is None


def test_attaching_twice_pulls_once() -> None:
    model = backbone("gla")
    pull = pull_on(model)
    pull.attach()
    hooks = len(all_hooks(model))
    task_loss(model, batch(0)).backward()
    once = gradients(model)
    pull.attach()
    task_loss(model, batch(0)).backward()
    assert all(map(torch.equal, gradients(model), once))
    assert len(all_hooks(model)) == hooks > 0


def test_detaching_twice_leaves_no_hook_and_the_gradients_of_before() -> None:
    model = backbone("gla")
    task_loss(model, batch(0)).backward()
    expected = gradients(model)
    pull = pull_on(model)
    assert not pull.attached
    for _ in range(2):
        pull.attach()
        assert pull.attached
        pull.detach()
        pull.detach()
        assert not pull.attached
    assert all_hooks(model) == []
    task_loss(model, batch(0)).backward()
    assert all(map(torch.equal, gradients(model), expected))


def test_a_model_under_a_pull_can_be_pickled_and_the_copy_is_free_of_it() -> None:
    model = backbone("gla")
    task_loss(model, batch(0)).backward()
    expected = gradients(model)
    pull_on(model).attach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        task_loss(twin, batch(0)).backward()
        assert all(map(torch.equal, gradients(twin), expected))


@pytest.mark.parametrize("strength", [0.0, -1.0, math.nan, INF])
def test_a_strength_that_is_no_positive_number_is_an_error(strength: float) -> None:
    with pytest.raises(ConfigError, match=r"strength=.* above 0"):
        pull_on(backbone("gla"), strength)


@pytest.mark.parametrize("featurizer", ["la", "sa"])
def test_a_layer_without_decay_has_no_handle_to_pull_at(featurizer: str) -> None:
    model = backbone(featurizer)
    assert last_layer(model).spec.decay is None
    assert [info.handles for info in layer_infos(model)] == [(), ()]


@pytest.mark.parametrize("featurizer", DECAYING)
def test_the_handle_reads_and_replaces_the_decay_that_the_layer_uses(featurizer: str) -> None:
    model, (tokens, _) = backbone(featurizer), batch(0)
    layer = last_layer(model)
    handle = layer.spec.decay
    assert handle is not None
    with watched_decay(model) as seen:
        model(tokens)
    [log_decay] = seen
    call = Call(layer.module, layer.module, args=(1, 2, 3, log_decay))
    args, kwargs = handle.write(call, (log_decay + 1,))
    behind = handle.read(call)
    assert behind is not None
    assert behind.tensors == (log_decay,)
    assert args[:3] == (1, 2, 3)
    assert torch.equal(args[3], log_decay + 1)
    assert kwargs == {}
    named = {name: p for name, p in layer.module.named_parameters() if name.startswith(handle.parameters)}
    assert {name.split(".")[0] for name in named} == set(handle.parameters)
    torch.autograd.grad(log_decay.sum(), list(named.values()))  # an error for one that does not enter the decay
