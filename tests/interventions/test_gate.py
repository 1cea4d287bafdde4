"""The gate of a layer is copied, swapped and put back bit for bit, with the optimizer's memory of it."""

from __future__ import annotations

import copy

import pytest
import torch

from ess_monitor.capture import find_layers
from ess_monitor.interventions.gate import GateCopy, gate_tensors
from tests.interventions.helpers import backbone, batch, task_loss

FEATURIZERS = {"wla": {"decay_logit"}, "gla": {"gate"}, "gla_s6": {"gate", "log_alpha"}, "s6": {"delta", "A_log"}}


def trained(featurizer: str, steps: int = 3):
    model = backbone(featurizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, lambda count=steps, first=0: train(model, optimizer, count, first)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int) -> None:
    for step in range(first, first + steps):
        task_loss(model, batch(seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        found |= {f"{names[id(parameter)]}/{key}": value.clone() for key, value in state.items()}
    return found


@pytest.mark.parametrize("featurizer", FEATURIZERS)
def test_the_gate_is_what_the_decay_follows_from(featurizer: str) -> None:
    model = backbone(featurizer)
    layer = find_layers(model)[-1]
    names = gate_tensors(layer)
    assert {name.partition(".")[0] for name in names} == FEATURIZERS[featurizer]


@pytest.mark.parametrize("featurizer", FEATURIZERS)
def test_restore_puts_back_the_gate_and_its_moments_and_nothing_else(featurizer: str) -> None:
    model, optimizer, run = trained(featurizer)
    run(3)
    layer = find_layers(model)[-1]
    gate, before = GateCopy.take(layer, optimizer), everything(model, optimizer)
    run(4, first=3)
    after = everything(model, optimizer)
    gate.restore(optimizer)
    now = everything(model, optimizer)
    own = {f"{layer.name}.{name}" for name in gate_tensors(layer)}
    for name, value in now.items():
        is_own = name.partition("/")[0] in own
        assert torch.equal(value, (before if is_own else after)[name]), name
    assert any(not torch.equal(before[name], after[name]) for name in own & before.keys()), "nothing was changed"


@pytest.mark.parametrize("featurizer", FEATURIZERS)
def test_in_place_the_model_is_the_one_with_the_gate_from_before(featurizer: str) -> None:
    model, optimizer, run = trained(featurizer)
    run(3)
    layer = find_layers(model)[-1]
    gate, values = GateCopy.take(layer, optimizer), {k: v.detach().clone() for k, v in gate_tensors(layer).items()}
    run(4, first=3)
    present = copy.deepcopy(model.state_dict())
    reference = copy.deepcopy(model)
    for name, tensor in gate_tensors(find_layers(reference)[-1]).items():
        tensor.data.copy_(values[name])
    data = batch(seed=99)
    with torch.no_grad():
        with gate.in_place():
            assert torch.equal(task_loss(model, data), task_loss(reference, data))
        with pytest.raises(RuntimeError), gate.in_place():
            raise RuntimeError
    for name, value in model.state_dict().items():
        assert torch.equal(value, present[name]), name


def test_moments_that_were_not_there_begin_anew() -> None:
    model, optimizer, run = trained("gla")
    layer = find_layers(model)[-1]
    gate = GateCopy.take(layer, optimizer)
    run(3)
    gate.restore(optimizer)
    assert all(not optimizer.state[tensor] for tensor in gate_tensors(layer).values())
    run(1, first=3)
    assert all(float(optimizer.state[tensor]["step"]) == 1 for tensor in gate_tensors(layer).values())


def test_a_copy_goes_through_a_checkpoint() -> None:
    model, optimizer, run = trained("gla_s6")
    run(3)
    layer = find_layers(model)[-1]
    gate = GateCopy.take(layer, optimizer)
    before = everything(model, optimizer)
    saved = copy.deepcopy(gate.state_dict())
    run(4, first=3)
    GateCopy.from_state(layer, saved).restore(optimizer)
    now = everything(model, optimizer)
    for name, tensor in gate_tensors(layer).items():
        if not isinstance(tensor, torch.nn.Parameter):
            continue
        assert torch.equal(now[f"{layer.name}.{name}"], before[f"{layer.name}.{name}"])
        assert torch.equal(now[f"{layer.name}.{name}/exp_avg"], before[f"{layer.name}.{name}/exp_avg"])


def test_a_copy_of_another_layer_is_not_taken() -> None:
    gla, wla = (find_layers(backbone(name))[-1] for name in ("gla", "wla"))
    assert GateCopy.from_state(wla, GateCopy.take(gla, None).state_dict()) is None
    assert GateCopy.from_state(wla, None) is None
