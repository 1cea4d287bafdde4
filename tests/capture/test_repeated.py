"""A layer that calls its op more than once in one forward pass: none of the calls is what it applies."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ess_monitor import CaptureConfig, CaptureError, capture_operators
from ess_monitor.capture import Captured, CaptureFailure, CaptureSpec, Layer, Sampler, find_layers
from ess_monitor.capture.capture_pass import EVERYTHING
from ess_monitor.capture.hooks.call_site import Call, CallSite, Op
from ess_monitor.ess import Operator, SoftmaxAttention

X = torch.randn(2, 8, 16)
TRAINING = EVERYTHING.model_copy(update={"source": "train"})


class Attends(nn.Module):
    """Causal attention of one head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)


class Bidirectional(Attends):
    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x) + self.attend(x.flip(1)).flip(1)


class WithMemory(Attends):
    """Attends to its past, and to something of another length."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(x)
        return y + F.scaled_dot_product_attention(y[:, None], x[:, None, :3], x[:, None, :3])[:, 0]


def fused(x: Tensor) -> Tensor:
    """An op that calls another one that is read."""
    return inner(x)


def inner(x: Tensor) -> Tensor:
    return x.cumsum(1)


class Fused(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return fused(x)


def sampled(net: nn.Module, call: Any, config: CaptureConfig = EVERYTHING) -> tuple[Captured | CaptureFailure, ...]:
    sampler = Sampler(find_layers(net), config)
    sampler.arm()
    call(net)
    return sampler.collect()


def test_the_reading_of_a_layer_with_two_calls_fails_with_the_reason() -> None:
    [item] = sampled(Bidirectional(), lambda net: net(X))
    assert isinstance(item, CaptureFailure)
    assert "calls its op more than once in one forward pass" in item.error
    with pytest.raises(CaptureError, match=r"could not read model: .*more than once"):
        capture_operators(Bidirectional(), X)


def test_a_later_forward_pass_does_not_make_it_whole_again() -> None:
    [item] = sampled(Bidirectional(), lambda net: (net(X), net(X)))
    assert isinstance(item, CaptureFailure)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_is_no_second_call(reentrant: bool) -> None:
    def call(net: nn.Module) -> None:
        checkpoint(net, X.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()

    [item] = sampled(Attends(), call, TRAINING)
    assert isinstance(item, Captured)


def test_a_layer_that_is_shared_is_read_in_its_first_forward_pass() -> None:
    net = nn.Sequential(Attends())
    [item] = sampled(net, lambda net: net[0](net[0](X)))
    assert isinstance(item, Captured)
    torch.testing.assert_close(item.operator.materialize(), capture_operators(net, X)["0"].materialize())


def test_a_call_that_is_not_the_one_meant_does_not_count() -> None:
    [item] = sampled(WithMemory(), lambda net: net(X))
    assert isinstance(item, Captured)


def test_an_op_that_calls_another_is_one_call() -> None:
    """The inner one ends first and is read; the end of the outer one is no second call."""
    seen: list[str] = []

    def build(call: Call) -> Operator:
        seen.append(call.op)
        q, k, _ = call.kwargs["x"][:, None].repeat(1, 1, 1, 3).chunk(3, -1)
        return SoftmaxAttention(q, k)

    net = Fused()
    site = CallSite(ops=(Op("fused", (globals(),)), Op("inner", (globals(),))))
    sampler = Sampler((Layer("0", net, CaptureSpec("SoftmaxAttention", build, site=site)),), EVERYTHING)
    for _ in range(2):
        sampler.arm()
        net(X)
        assert [type(item) for item in sampler.collect()] == [Captured]
    assert seen == ["inner", "inner"]


def test_models_that_run_in_two_threads_at_once_keep_their_layers_apart() -> None:
    together = threading.Barrier(2, timeout=60)

    class Waits(Attends):
        def forward(self, x: Tensor) -> Tensor:
            together.wait()  # both are in their forward now
            y = self.attend(x)
            together.wait()
            return y

    models = [Waits(), Waits()]
    attends = {model: Attends() for model in models}
    for model, alone in attends.items():
        alone.load_state_dict(model.state_dict())
    samplers = [Sampler(find_layers(model), EVERYTHING) for model in models]
    for sampler in samplers:
        sampler.arm()
    threads = [threading.Thread(target=model, args=(X,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for model, sampler in zip(models, samplers, strict=True):
        [item] = sampler.collect()
        assert isinstance(item, Captured)
        [expected] = capture_operators(attends[model], X).values()
        torch.testing.assert_close(item.operator.materialize(), expected.materialize())
