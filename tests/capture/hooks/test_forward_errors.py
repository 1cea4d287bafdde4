"""A forward pass that raises while a sample is armed, in a loop that nobody closes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ess_monitor import CaptureConfig, Monitor, MonitorConfig, OperatorError
from ess_monitor.capture import Captured, Sampler, find_layers
from ess_monitor.capture.hooks.forward_errors import when_raised
from ess_monitor.featurizers import GLA, Backbone, BackboneConfig

X = torch.randn(2, 8, 16)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixers = nn.Sequential(GLA(16, 2), GLA(16, 2))
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixers[0](x)
        if self.fail:
            raise ZeroDivisionError("injected")
        return self.mixers[1](x)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def stance() -> str:
    return torch._dynamo.eval_frame._stance.stance


def armed(net: nn.Module) -> Sampler:
    sampler = Sampler(find_layers(net), CaptureConfig(), model=net)
    sampler.arm()
    return sampler


def test_hooks_and_stance_are_gone_right_after_the_exception_and_the_next_sample_works() -> None:
    net = Net()
    sampler = armed(net)
    assert stance() == "force_eager"
    net.fail = True
    with pytest.raises(ZeroDivisionError):
        net(X)
    assert hooks_of(net) == 0
    assert stance() == "default"
    assert not sampler.armed
    assert sampler.collect() == ()
    net.fail = False
    sampler.arm(any_pass=True)
    net(X)
    assert all(isinstance(item, Captured) for item in sampler.collect())
    assert hooks_of(net) == 0


def test_a_plain_loop_without_a_block_leaves_nothing_and_goes_on() -> None:
    torch.manual_seed(0)
    net = Backbone(BackboneConfig(vocab_size=16, width=16, state_size=8))
    config = MonitorConfig.load(environment=False, every_n_steps=3, overhead_budget_ratio=None)
    monitor = Monitor(net, config)
    monitor.start()
    with pytest.raises(IndexError):
        net(torch.full((2, 8), 99))
    assert hooks_of(net) == 0
    assert stance() == "default"
    for _ in range(2):
        net(torch.randint(0, 16, (2, 8))).sum().backward()
        monitor.step()
    assert len(monitor.flush()) == len(find_layers(net))
    monitor.close()


def test_a_layer_that_is_the_model_itself_and_hooks_of_others_do_not_hinder() -> None:
    mixer, seen = GLA(16, 2), list[Any]()
    mixer.register_forward_hook(lambda *given: seen.append(given[2]), always_call=True)
    armed(mixer)
    mixer.register_forward_hook(lambda *given: seen.append(given[2]), always_call=True)
    armed(mixer)
    with pytest.raises(Exception, match="16"):
        mixer(torch.randn(2, 8, 7))
    assert seen == [None, None]
    assert hooks_of(mixer) == 2
    assert stance() == "default"


def test_a_hook_that_is_added_during_the_forward_does_not_turn_the_exception_into_another() -> None:
    class Adds(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.register_forward_hook(lambda *given: None, always_call=True)
            return super().forward(x)

    net = Adds()
    net.fail = True
    sampler = armed(net)
    with pytest.raises(ZeroDivisionError):
        net(X)
    assert sampler.armed
    sampler.remove()
    assert hooks_of(net) == 1


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
@pytest.mark.parametrize("how", ["whole", "in place"])
def test_a_compiled_model_goes_on_compiled(how: str) -> None:
    net = Net()
    called: Any = net
    torch._dynamo.reset()
    if how == "whole":
        called = torch.compile(net, backend="eager")
    else:
        net.compile(backend="eager")
    called(X)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    sampler = Sampler(find_layers(net), CaptureConfig(), model=called)
    sampler.arm()
    with pytest.raises(OperatorError):
        called(torch.randn(2, 8, 7))
    assert not sampler.armed
    assert hooks_of(net) == 0
    assert stance() == "default"
    called(X)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
    sampler.arm(any_pass=True)
    called(X)
    assert [type(item) for item in sampler.collect()] == [Captured, Captured]
    torch._dynamo.reset()


def test_an_exception_that_is_handled_around_the_call_is_not_taken_for_one_of_it() -> None:
    net, called = Net(), list[int]()
    forget = when_raised(net, lambda: called.append(1))
    try:
        raise ValueError("of the user's")
    except ValueError:
        net(X)
    assert called == []
    assert hooks_of(net) == 1
    forget()
    forget()
    assert hooks_of(net) == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_recomputation_of_a_checkpointed_model_loses_no_sample(reentrant: bool) -> None:
    net = Net()
    sampler = armed(net)
    checkpoint(net, X.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
    assert sampler.armed
    assert [type(item) for item in sampler.collect()] == [Captured, Captured]
    assert hooks_of(net) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_of_the_model_tells_nobody(copied: Any) -> None:
    net = Net()
    net.fail = True
    sampler = armed(net)
    twin = copied(net)
    with pytest.raises(ZeroDivisionError):
        twin(X)
    assert sampler.armed
    sampler.remove()
