"""Which layer a call belongs to, whatever happens in between."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ess_monitor.capture.hooks import call_site as sites
from ess_monitor.capture.hooks.call_site import Call, CallSite, Op
from ess_monitor.capture.hooks.global_names import names_used


def mix(x: Tensor, scale: float = 1.0, **more: Any) -> Tensor:
    """The op of the layers below."""
    if more.get("fail"):
        raise RuntimeError("not today")
    return scale * x.cumsum(1)


class Mixer(nn.Module):
    """A layer that calls an op through a global name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * mix(x, fail=self.fail)


class Outer(nn.Module):
    """Calls the op itself, before and after a layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Mixer()

    def forward(self, x: Tensor) -> Tensor:
        return mix(self.inner(mix(x, 2.0)), 3.0)


def site(layer: nn.Module) -> CallSite:
    return CallSite(ops=(Op("mix", names_used(type(layer))["mix"]),))


def watched(layer: nn.Module, seen: list[Call]) -> sites.HookHandle:
    return site(layer).watch(layer, after=seen.append)


X = torch.arange(6.0).reshape(1, 6)


def test_a_call_belongs_to_the_layer_whose_code_makes_it() -> None:
    first, second = Mixer(), Mixer()
    seen_first: list[Call] = []
    seen_second: list[Call] = []
    watches = [watched(first, seen_first), watched(second, seen_second)]
    second(first(X))
    for watch in watches:
        watch.remove()
    [call] = seen_first
    assert call.layer is first
    assert torch.equal(call.kwargs["x"], X)
    assert call.kwargs["scale"] == 1.0
    assert call.kwargs["fail"] is False  # out of **more
    assert torch.equal(call.output, X.cumsum(1))
    assert [call.layer for call in seen_second] == [second]


def test_a_layer_inside_a_layer_has_its_own_calls() -> None:
    outer = Outer()
    seen_outer: list[Call] = []
    seen_inner: list[Call] = []
    watches = [watched(outer, seen_outer), watched(outer.inner, seen_inner)]
    outer(X)
    for watch in watches:
        watch.remove()
    assert [call.kwargs["scale"] for call in seen_outer] == [2.0, 3.0]
    assert [call.kwargs["scale"] for call in seen_inner] == [1.0]


def test_calls_of_others_are_not_seen() -> None:
    layer, seen = Mixer(), list[Call]()
    watch = watched(layer, seen)
    mix(X)
    Mixer()(X)
    watch.remove()
    assert seen == []


def test_attaching_and_detaching_leaves_module_and_library_as_they_were() -> None:
    layer = Mixer()
    hooks = {name: dict(value) for name, value in vars(layer).items() if "hooks" in name}
    space = dict(globals())
    for _ in range(3):
        watches = [watched(layer, []), watched(layer, [])]
        layer(X)
        for watch in watches:
            watch.remove()
            watch.remove()
    assert {name: dict(value) for name, value in vars(layer).items() if "hooks" in name} == hooks
    assert globals()["mix"] is space["mix"]
    assert sites._RUNNING.forwards == []


def test_an_exception_in_the_users_forward_leaves_nothing_behind() -> None:
    layer, seen = Mixer(), list[Call]()
    watch = watched(layer, seen)
    layer.fail = True
    with pytest.raises(RuntimeError, match="not today"):
        layer(X)
    assert sites._RUNNING.forwards == []
    layer.fail = False
    layer(X)
    watch.remove()
    assert len(seen) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_is_seen_in_its_forward_and_in_its_recomputation(reentrant: bool) -> None:
    layers, seen = [Mixer(), Mixer()], list[Call]()
    watches = [watched(layer, seen) for layer in layers]
    x = X.clone().requires_grad_()
    for layer in layers:
        x = checkpoint(layer, x, use_reentrant=reentrant)
    assert [call.layer for call in seen] == layers
    x.sum().backward()
    assert [call.layer for call in seen] == [*layers, *reversed(layers)]
    assert sites._RUNNING.forwards == []
    for watch in watches:
        watch.remove()


def test_a_replica_is_the_module_that_was_called() -> None:
    """As DataParallel makes them: a shallow copy that shares the hooks and has parameters of its own."""
    layer, called = nn.Linear(2, 2), []
    handle = CallSite().watch(layer, after=lambda call: called.append(call.module))
    replica = copy.copy(layer)
    replica(torch.ones(1, 2))
    layer(torch.ones(1, 2))
    handle.remove()
    assert [module is replica for module in called] == [True, False]


def test_arguments_can_be_replaced_wherever_they_were_given() -> None:
    layer = Mixer()
    watch = site(layer).watch(layer, before=lambda call: ((), {**call.kwargs, "x": call.kwargs["x"] + 1, "scale": 5.0}))
    assert torch.equal(layer(X), 5 * (X + 1).cumsum(1))
    watch.remove()
    assert torch.equal(layer(X), X.cumsum(1))


def _pickled(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))  # type: ignore[no-any-return]


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled])
def test_a_copy_of_a_watched_model_is_not_watched(copied: Callable[[nn.Module], nn.Module]) -> None:
    layer, seen = Mixer(), list[Call]()
    watch = watched(layer, seen)
    twin = copied(layer)
    twin(X)
    assert seen == []
    layer(X)
    watch.remove()
    assert len(seen) == 1


def test_names_are_found_in_wrapped_and_inherited_methods_and_not_in_overridden_ones() -> None:
    class Child(Mixer):
        pass

    class Silent(Mixer):
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert names_used(Child)["mix"] == (globals(),)
    assert "mix" not in names_used(Silent)


def test_an_op_that_does_not_say_what_it_takes_is_not_seen_and_still_called(monkeypatch: pytest.MonkeyPatch) -> None:
    class Opaque:
        """A function of a compiled extension, without a signature."""

        __name__ = "mix"
        __signature__ = "none"

        def __call__(self, x: Tensor, **more: Any) -> Tensor:
            return 2 * x

    monkeypatch.setitem(globals(), "mix", Opaque())
    layer, seen = Mixer(), list[Call]()
    watch = watched(layer, seen)
    assert torch.equal(layer(X), 2 * X)
    watch.remove()
    assert seen == []


def test_a_place_that_cannot_be_watched_leaves_nothing_behind() -> None:
    layer = Mixer()
    with pytest.raises(AttributeError):
        CallSite(path="gone").watch(layer, after=lambda call: None)
    namespace: dict[str, Any] = {}
    with pytest.raises(KeyError):
        CallSite(ops=(Op("gone", (namespace,)),)).watch(layer, after=lambda call: None)
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    assert namespace == {}
