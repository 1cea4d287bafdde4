"""Keep what a forward pass may change in a model, and put it back bit by bit."""

from __future__ import annotations

import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from functools import partial
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

_INTERNALS = (frozenset(vars(nn.Module())) - {"training", "_buffers", "_non_persistent_buffers_set"}) | {
    "_compiled_call_impl"
}
"""Attributes of `nn.Module` itself that are left alone: parameters, sub-modules, hooks, compiled code."""

_NUMBERS_AND_NAMES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_PLAIN = frozenset((*_NUMBERS_AND_NAMES, type, FunctionType, MethodType, BuiltinFunctionType))
"""Types whose objects hold no state of the model. Their attributes are set back, nothing more."""

_MAPPINGS = frozenset((dict, OrderedDict, defaultdict, Counter))
_CONTAINERS = _MAPPINGS | {list, set, deque}


class Contents:
    """What a list, dict, set or deque refers to. What that refers to in turn is not copied."""

    def __init__(self, container: Any) -> None:
        self._container = container
        self._kept: Any = dict(container) if isinstance(container, dict) else type(container)(container)

    def restore(self) -> None:
        """Put it back, in its order. A container that has not changed is not written to."""
        container, kept = self._container, self._kept
        if isinstance(container, set):
            same = container == kept
        else:
            same = len(container) == len(kept) and all(map(is_, container, kept))
            if same and isinstance(container, dict):
                same = all(map(is_, container.values(), kept.values()))
        if same:
            return
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(kept)


class _Attributes(NamedTuple):
    """Of a module, without the internals of `nn.Module`."""

    present: dict[str, Any]
    """The module's own dictionary."""
    entries: int
    """In it, internals too."""
    kept: dict[str, Any]

    def restore(self) -> None:
        present, kept = self.present, self.kept
        missing = object()
        if len(present) == self.entries and all(present.get(name, missing) is value for name, value in kept.items()):
            return
        for name in [name for name in present if name not in kept and name not in _INTERNALS]:
            del present[name]
        present.update(kept)


class _Leaf(NamedTuple):
    """A parameter. A forward pass does not write to it, so its content is not copied."""

    tensor: torch.Tensor
    requires_grad: bool
    grad: torch.Tensor | None

    def restore(self) -> None:
        if self.tensor.requires_grad != self.requires_grad:
            self.tensor.requires_grad_(self.requires_grad)
        if self.tensor.grad is not self.grad:
            self.tensor.grad = self.grad


class ModelState:
    """What a forward pass may change in a model, as it is now.

    Kept are all buffers and other tensors that are not parameters, random generators, NumPy arrays, and which object
    each attribute and each entry of a list, dict, set or deque is; of the model's modules, of modules that they hold
    without having registered them, and of containers inside containers. Of parameters, `requires_grad` and which
    tensor `grad` is.

    Not kept is what objects of other classes hold, class attributes, and iterators. The copies take as much memory as
    the tensors and arrays do that are not parameters.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> state = ModelState(model)
        >>> _ = model(torch.ones(3, 2))
        >>> model.calls = 1
        >>> state.restore()
        >>> model.running_mean.tolist(), model.num_batches_tracked.item(), hasattr(model, "calls")
        ([0.0, 0.0], 0, False)
    """

    def __init__(self, model: nn.Module) -> None:
        self.devices: set[torch.device] = set()
        """Where its tensors are."""
        self._attributes: list[_Attributes] = []
        self._containers: list[Contents] = []
        self._leaves: list[_Leaf] = []
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Plain tensors, and another tensor on the memory of each."""
        self._places: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] = []
        """What stands at each of `_places`."""
        self._other_tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._setters: list[Callable[[], object]] = []
        self._keep(model)

    def restore(self) -> None:
        """Put everything back. May be called any number of times."""
        for attributes in self._attributes:
            attributes.restore()
        for contents in self._containers:
            contents.restore()
        for leaf in self._leaves:
            leaf.restore()
        with torch.no_grad():
            for tensor, memory in self._tensors:
                moved = tensor.data_ptr() != memory.data_ptr()
                if moved or tensor.shape != memory.shape or tensor.stride() != memory.stride():
                    tensor.data = memory
            if self._places:
                torch._foreach_copy_(self._places, self._copies)
            for tensor, copy in self._other_tensors:
                tensor.detach().copy_(copy)
        for put in self._setters:
            put()

    def _keep(self, model: nn.Module) -> None:
        # Keeps the objects as well: an object that is gone could give its id to another one.
        seen: dict[int, Any] = {}
        waiting: list[Any] = [model]
        while waiting:
            value = waiting.pop()
            if type(value) not in _PLAIN and id(value) not in seen:
                seen[id(value)] = value
                waiting.extend(self._keep_one(value))

    def _keep_one(self, value: Any) -> Iterable[Any]:
        """Keep the state of an object and return what it holds."""
        kind = type(value)
        if issubclass(kind, nn.Module):
            return self._keep_module(value)
        if issubclass(kind, torch.Tensor):
            self._keep_tensor(value)
        elif kind in _CONTAINERS:
            self._containers.append(Contents(value))
            return tuple(value.values() if kind in _MAPPINGS else value)
        elif issubclass(kind, tuple):
            return tuple(value)
        else:
            self._keep_generator(kind, value)
        return ()

    def _keep_module(self, module: nn.Module) -> Iterable[Any]:
        present = vars(module)
        kept = {name: value for name, value in present.items() if name not in _INTERNALS}
        self._attributes.append(_Attributes(present, len(present), kept))
        for parameter in module._parameters.values():
            if parameter is not None:
                yield parameter
        yield from module._modules.values()
        yield from kept.values()
        if type(module._buffers) not in _MAPPINGS:  # of a scripted module
            yield from module._buffers.values()

    def _keep_tensor(self, tensor: torch.Tensor) -> None:
        self.devices.add(tensor.device)
        if tensor.is_leaf and (tensor.requires_grad or isinstance(tensor, nn.Parameter)):
            self._leaves.append(_Leaf(tensor, tensor.requires_grad, tensor.grad))
        if isinstance(tensor, nn.Parameter) or is_lazy(tensor) or tensor.is_meta or tensor.is_inference():
            return
        # `data` rather than `detach()`: a graph that has kept a buffer for its backward must not see this write.
        memory = tensor.data
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.is_quantized:
            self._other_tensors.append((tensor, memory.clone()))
        elif memory.untyped_storage().nbytes() or not memory.numel():  # FSDP frees memory behind tensors
            place = memory
            for dim, (size, stride) in enumerate(zip(memory.shape, memory.stride(), strict=True)):
                if stride == 0 and size > 1:
                    place = place.narrow(dim, 0, 1)  # an expanded tensor cannot be written to
            self._tensors.append((tensor, memory))
            self._places.append(place)
            self._copies.append(place.clone())

    def _keep_generator(self, kind: type, value: Any) -> None:
        if issubclass(kind, torch.Generator):
            self._setters.append(partial(value.set_state, value.get_state()))
        elif issubclass(kind, random.Random):
            self._setters.append(partial(value.setstate, value.getstate()))
        elif "numpy.random" in sys.modules:
            self._keep_of_numpy(sys.modules["numpy"], kind, value)

    def _keep_of_numpy(self, numpy: Any, kind: type, value: Any) -> None:
        if issubclass(kind, numpy.random.Generator):
            bits = value.bit_generator
            self._setters.append(partial(setattr, bits, "state", bits.state))
        elif issubclass(kind, numpy.random.RandomState):
            self._setters.append(partial(value.set_state, value.get_state()))
        elif kind is numpy.ndarray and value.flags.writeable and value.flags.owndata:
            self._setters.append(partial(numpy.copyto, value, value.copy()))


class RandomStates:
    """The states of the random generators that a forward pass may draw from: torch's, Python's and NumPy's.

    Of torch's, those of the CPU and of `devices`, and of the current device of each kind among them. Reading and
    setting them waits for no device, and starts none.
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._setters: list[Callable[[], object]] = [
            partial(torch.set_rng_state, torch.get_rng_state()),
            partial(random.setstate, random.getstate()),
        ]
        if "numpy.random" in sys.modules:
            numpy_random = sys.modules["numpy.random"]
            self._setters.append(partial(numpy_random.set_state, numpy_random.get_state()))
        devices = set(devices)
        for kind in {device.type for device in devices} - {"cpu", "meta"}:
            module: Any = getattr(torch, kind, None)
            if not hasattr(module, "get_rng_state"):
                continue
            if kind == "mps":  # the only one there is
                self._setters.append(partial(module.set_rng_state, module.get_rng_state()))
                continue
            numbers = {device.index for device in devices if device.type == kind and device.index is not None}
            for number in numbers | {module.current_device()}:
                self._setters.append(partial(module.set_rng_state, module.get_rng_state(number), number))

    def restore(self) -> None:
        """Put them back. May be called any number of times."""
        for put in self._setters:
            put()
