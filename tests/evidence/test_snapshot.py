"""What a block keeps of a model and of the generators, object by object."""

from __future__ import annotations

import random
import sys
import weakref
from collections import defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ess_monitor.errors import CaptureError, ConfigError
from ess_monitor.evidence.snapshot import ModelState, RandomStates
from ess_monitor.evidence.undisturbed import Undisturbed
from tests.evidence.dump import differences, everything
from tests.evidence.models import Around, Averaging, Counting, Noisy
from tests.evidence.training import Raised, vectors


def test_the_objects_are_the_same_and_not_only_their_values() -> None:
    model = Averaging()
    model(vectors(0))
    before = dict(model.named_buffers())
    pointers = {name: tensor.data_ptr() for name, tensor in before.items()}
    with Undisturbed(model):
        model(vectors(1))
        assert model.rebound is not before["rebound"]
        assert model.moved.data_ptr() != pointers["moved"]
    after = dict(model.named_buffers())
    assert all(after[name] is tensor for name, tensor in before.items())
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == pointers


def test_containers_keep_their_identity_order_and_limit() -> None:
    model = Counting()
    model.table = defaultdict(list, a=[1], b=[2])
    held = (model.seen, model.recent, model.table, model.shadow["weights"])
    model(vectors(0))
    before = everything(model)
    state = ModelState(model)
    model(vectors(1))
    model.table["c"].append(3)
    model.table["b"] = model.table.pop("a")
    model.shadow["weights"]["other"] = torch.zeros(1)
    model.recent.clear()
    state.restore()
    assert differences(before, everything(model)) == []
    assert held == (model.seen, model.recent, model.table, model.shadow["weights"])
    assert all(one is other for one, other in zip(held, (model.seen, model.recent, model.table), strict=False))
    assert isinstance(model.recent, deque)
    assert model.recent.maxlen == 3
    assert list(model.table) == ["a", "b"]


def test_what_a_forward_pass_adds_is_removed_and_what_it_removes_comes_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    names = list(model[1]._buffers)
    before = everything(model)
    with Undisturbed(model):
        model[0].cache = torch.ones(2)
        model[0].register_buffer("table", torch.ones(2), persistent=False)
        model[1].running_mean = model[1]._buffers.pop("running_mean")
        model.eval()
        model[0].weight.requires_grad_(False)
        model[0].weight.grad = torch.ones(2, 2)
    assert differences(before, everything(model)) == []
    assert list(model[1]._buffers) == names
    assert model[0].weight.grad is None


def test_an_attribute_that_is_deleted_comes_back() -> None:
    model = Counting()
    with Undisturbed(model):
        del model.calls
    assert model.calls == 0


def test_hooks_and_compiled_code_are_left_alone() -> None:
    model = nn.Linear(2, 2)
    calls: list[str] = []
    with Undisturbed(model):
        handle = model.register_forward_hook(lambda *_: calls.append("hook"))
        model._compiled_call_impl = model._call_impl
    assert "_compiled_call_impl" in vars(model)
    model(torch.ones(1, 2))
    assert calls == ["hook"]
    handle.remove()


def test_a_graph_that_needs_a_buffer_does_not_see_that_it_was_put_back() -> None:
    model = nn.Module()
    model.register_buffer("mask", torch.ones(3))
    x = torch.ones(3, requires_grad=True)
    loss = (x * model.mask).sum()
    with Undisturbed(model) as block:
        block.rewind()
    loss.backward()
    assert x.grad is not None


def test_odd_things_in_a_model_do_no_harm() -> None:
    model: Any = Around(nn.Identity())
    target = nn.Linear(1, 1)
    model.proxy = weakref.proxy(target)
    del target
    model.itself, model.loop = [model], []
    model.loop.append(model.loop)
    model.sparse = torch.eye(3).to_sparse()
    model.meta = torch.ones(3, device="meta")
    model.freed = torch.ones(3)
    model.freed.untyped_storage().resize_(0)
    model.windows = torch.arange(5.0).unfold(0, 3, 1)
    with torch.inference_mode():
        model.inferred = torch.ones(3)
    model.lazy = nn.LazyLinear(2)
    model.frozen = np.zeros(2)
    model.frozen.flags.writeable = False
    model.handle = sys.stdout
    with Undisturbed(model) as block:
        model.sparse.mul_(2)
        model.windows[0].mul_(2)
        block.rewind()
        assert torch.equal(model.sparse.to_dense(), torch.eye(3))
        assert torch.equal(model.windows[0], torch.arange(3.0))


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_model() -> None:
    model = torch.jit.script(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)))
    norm = next(module for module in model.modules() if "running_mean" in dict(module.named_buffers(recurse=False)))
    with Undisturbed(model):
        model(torch.randn(4, 2))
        assert norm.num_batches_tracked == 1
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(2))


def test_the_block_ends_as_it_began_where_its_start_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ModelState, model: nn.Module) -> None:
        raise MemoryError

    block = Undisturbed(Around(nn.Identity()))
    with monkeypatch.context() as patch:
        patch.setattr(ModelState, "_keep_all", fail)
        with pytest.raises(MemoryError), block:
            raise AssertionError
    assert torch.is_grad_enabled()
    with pytest.raises(CaptureError, match="outside the block"):
        block.rewind()
    with block:  # it can be entered again
        assert not torch.is_grad_enabled()
        with pytest.raises(CaptureError, match="open already"):
            block.__enter__()
    assert torch.is_grad_enabled()


def test_what_fails_at_the_end_keeps_nothing_else_from_being_put_back() -> None:
    model = Around(Noisy(), dropout=0.5)
    before = torch.get_rng_state()

    def fail() -> None:
        raise Raised

    block = Undisturbed(model)
    block.__enter__()
    model(vectors(0))
    assert block._state is not None
    block._state._setters.append(fail)
    with pytest.raises(Raised):
        block.__exit__()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_arguments_are_checked() -> None:
    with pytest.raises(ConfigError, match="model is a str"):
        Undisturbed("model")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="alone"):
        Undisturbed(nn.Linear(1, 1), alone=1)  # type: ignore[arg-type]


def test_generators_are_put_back_any_number_of_times() -> None:
    states = RandomStates([torch.device("cpu"), torch.device("meta")])

    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())  # noqa: NPY002

    first = draw()
    assert draw() != first
    for _ in range(2):
        states.restore()
        assert draw() == first


class Device:
    """Stands for `torch.cuda`: two devices, whose generators are numbers."""

    def __init__(self) -> None:
        self.states = {0: 10, 1: 20, 2: 30}

    def current_device(self) -> int:
        return 0

    def get_rng_state(self, device: int) -> int:
        return self.states[device]

    def set_rng_state(self, state: int, device: int) -> None:
        self.states[device] = state


class OneDevice:
    """Stands for `torch.mps`."""

    def __init__(self) -> None:
        self.state = 10

    def get_rng_state(self) -> int:
        return self.state

    def set_rng_state(self, state: int) -> None:
        self.state = state


def test_the_generators_of_the_models_devices_and_of_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, mps = Device(), OneDevice()
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "mps", mps)
    states = RandomStates([torch.device("cuda", 1), torch.device("mps")])
    cuda.states, mps.state = {0: 11, 1: 21, 2: 31}, 11
    states.restore()
    assert cuda.states == {0: 10, 1: 20, 2: 31}
    assert mps.state == 10


def test_no_device_is_touched_by_a_model_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_rng_state", pytest.fail)
    monkeypatch.setattr(torch.cuda, "current_device", pytest.fail)
    with Undisturbed(Around(nn.Identity())):
        pass
