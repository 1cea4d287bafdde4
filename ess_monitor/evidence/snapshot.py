"""Keep what a forward pass may change in a model, and put it back bit by bit."""

from __future__ import annotations

import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import repeat
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

_INTERNALS = (frozenset(vars(nn.Module())) - {"training"}) | {"_compiled_call_impl"}
"""Attributes of `nn.Module` itself. Parameters, sub-modules, hooks and compiled code are left alone."""

_NUMBERS_AND_NAMES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_PLAIN = frozenset((*_NUMBERS_AND_NAMES, type, FunctionType, MethodType, BuiltinFunctionType))
"""Types whose objects hold no state of the model. Attributes that refer to them are set back, nothing more."""

_MAPPINGS = frozenset((dict, OrderedDict, defaultdict, Counter))
_CONTAINERS = _MAPPINGS | {list, set, deque}
_MISSING = object()


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


def _put_back(attributes: dict[str, Any], kept: dict[str, Any]) -> None:
    for name in [name for name in attributes if name not in kept and name not in _INTERNALS]:
        del attributes[name]
    attributes.update(kept)


class ModelState:
    """What a forward pass may change in a model, as it is now.

    Kept are all buffers and other tensors that are not parameters, random generators, NumPy arrays, and which object
    each attribute and each entry of a list, dict, set or deque is; of the model's modules, of modules that they hold
    without having registered them, and of containers inside containers. Of parameters, `requires_grad` and which
    tensor `grad` is.

    Not kept is what objects of other classes hold, class attributes, and iterators. The copies take as much memory as
    the tensors and arrays do that are not parameters.

    Examples:
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
        self.modules: list[nn.Module] = []
        """The model's, and those that they hold without having registered them."""
        self._attributes: list[tuple[dict[str, Any], int, dict[str, Any]]] = []
        """The dictionary of each module, the number of its entries, and those that are not internals."""
        self._empty: list[Any] = []
        """Containers without content: most modules have some."""
        self._containers: list[Contents] = []
        self._leaves: list[tuple[torch.Tensor, bool, torch.Tensor | None]] = []
        """Parameters, whether they require a gradient, and which tensor that is."""
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Plain tensors, and another tensor on the memory of each."""
        self._places: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] = []
        """What stands at each of `_places`."""
        self._other_tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._setters: list[Callable[[], object]] = []
        self._keep_all(model)

    def restore(self) -> None:
        """Put everything back. May be called any number of times."""
        for attributes, entries, kept in self._attributes:
            found = map(attributes.get, kept, repeat(_MISSING))
            if len(attributes) != entries or not all(map(is_, found, kept.values())):
                _put_back(attributes, kept)
        for container in self._empty:
            if container:
                container.clear()
        for contents in self._containers:
            contents.restore()
        for leaf, requires_grad, grad in self._leaves:
            if leaf.requires_grad is not requires_grad:
                leaf.requires_grad_(requires_grad)
            if leaf.grad is not grad:
                leaf.grad = grad
        with torch.no_grad():
            self._restore_tensors()
        for put in self._setters:
            put()

    def _restore_tensors(self) -> None:
        for tensor, memory in self._tensors:
            moved = tensor.data_ptr() != memory.data_ptr()
            if moved or tensor.shape != memory.shape or tensor.stride() != memory.stride():
                tensor.data = memory
        if self._places:
            torch._foreach_copy_(self._places, self._copies)
        for tensor, copy in self._other_tensors:
            tensor.copy_(copy)

    def _keep_all(self, model: nn.Module) -> None:
        # Objects and not their ids alone: one that is gone could give its id to another.
        seen: dict[int, Any] = {}
        waiting: list[Any] = [model]
        while waiting:
            value = waiting.pop()
            kind = type(value)
            if kind in _PLAIN or id(value) in seen:
                continue
            seen[id(value)] = value
            if kind is nn.Parameter:
                self._keep_parameter(value)
            elif issubclass(kind, nn.Module):
                self._keep_module(value, waiting)
            elif issubclass(kind, torch.Tensor):
                self._keep_tensor(kind, value)
            elif kind in _CONTAINERS:
                self._keep_container(value, waiting)
            elif issubclass(kind, tuple):
                waiting.extend(value)
            else:
                self._keep_generator(kind, value)

    def _keep_module(self, module: Any, waiting: list[Any]) -> None:
        attributes = vars(module)
        kept = {name: value for name, value in attributes.items() if name not in _INTERNALS}
        self.modules.append(module)
        self._attributes.append((attributes, len(attributes), kept))
        waiting.extend(module._modules.values())
        waiting.extend(module._parameters.values())
        waiting.extend(value for value in kept.values() if type(value) not in _PLAIN)
        for container in (module._buffers, module._non_persistent_buffers_set):
            if type(container) in _CONTAINERS:
                self._keep_container(container, waiting)
            else:  # of a scripted module
                waiting.extend(container.values())

    def _keep_container(self, container: Any, waiting: list[Any]) -> None:
        if container:
            self._containers.append(Contents(container))
            waiting.extend(container.values() if isinstance(container, dict) else container)
        else:
            self._empty.append(container)

    def _keep_parameter(self, tensor: torch.Tensor) -> None:
        self.devices.add(tensor.device)
        self._leaves.append((tensor, tensor.requires_grad, tensor.grad))

    def _keep_tensor(self, kind: type, tensor: torch.Tensor) -> None:
        plain = kind is torch.Tensor
        if not plain and isinstance(tensor, nn.Parameter):  # of a class of its own
            self._keep_parameter(tensor)
            return
        self.devices.add(tensor.device)
        if tensor.requires_grad and tensor.is_leaf:
            self._keep_parameter(tensor)
        if tensor.is_meta or tensor.is_inference() or (not plain and is_lazy(tensor)):
            return
        # `data` rather than `detach()`: a graph that has kept a buffer for its backward must not see this write.
        memory = tensor.data
        if not plain or tensor.layout != torch.strided or tensor.is_quantized:
            self._other_tensors.append((tensor, memory.clone()))
        elif memory.untyped_storage().nbytes() or not memory.numel():  # FSDP frees memory behind tensors
            place = memory if memory.is_contiguous() else _without_repetition(memory)
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
        elif kind is numpy.ndarray and value.flags.behaved and value.flags.owndata:
            self._setters.append(partial(numpy.copyto, value, value.copy()))


def _without_repetition(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of an expanded tensor that has memory of its own: it can be written to."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


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
