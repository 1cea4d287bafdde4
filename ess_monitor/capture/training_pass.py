"""Tell the forward pass that trains from rollouts, generation, evaluation and teachers.

All of them call the same layers, with or without gradients and in any mode. Only the backward pass tells them apart: a
call has trained when a gradient arrives at what it put out, in a backward pass that goes on to parameters.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import nn
from torch.autograd.graph import Node, get_gradient_edge

from ess_monitor.capture.hooks.call_site import HookHandle, ModuleHook

logger = logging.getLogger("ess_monitor")

Result = TypeVar("Result")

_NO_BACKWARD = -1
_MOST_PARAMETERS = 64
"""More are not asked whether a gradient reaches them."""


@dataclass(eq=False)
class Candidate(Generic[Result]):
    """What was read in one call of a layer, until it is known whether the call trains."""

    layer: str
    """Name of the layer."""
    result: Result
    forward_number: int = 0
    """Number of the layer's forward call that made the call; 0 where it is the layer's own call."""
    end_number: int = 0
    """When the call ended."""
    parameters: tuple[Node, ...] = ()
    """Where gradients of the layer's parameters arrive."""
    backward: int = _NO_BACKWARD
    """The backward pass that the call is a recomputation in."""


class TrainingPass(Generic[Result]):
    """Collects candidates, and keeps those whose output gets a gradient: of each layer the first call that trains.

    A candidate is held by the graph of its output alone, and gone with it: an evaluation leaves nothing. A call whose
    output requires no gradient (a frozen layer) counts with the innermost module around it whose output does. A call
    without gradients is no candidate; reentrant checkpointing repeats it with them.

    Args:
        modules: the layers.
        model: their model; without it, calls whose output requires no gradient are lost.
    """

    def __init__(self, modules: Iterable[nn.Module], model: nn.Module | None = None) -> None:
        self._around = () if model is None else modules_around(model, modules)
        self._handle = HookHandle()
        self._closed = False
        self._running = _CallStack()
        self._found: dict[str, tuple[tuple[bool, int], Candidate[Result]]] = {}
        """Layer -> (whether the gradient came by a module around it, backward pass), and the candidate."""
        self._backwards: dict[int, int] = {}
        """The backward passes in which gradients arrived, numbered in order."""
        self._latest: dict[str, weakref.ref[Candidate[Result]]] = {}

    @property
    def found(self) -> dict[str, Result]:
        """What was read in the calls that trained, by layer."""
        return {name: candidate.result for name, (_, candidate) in self._found.items()}

    def attach(self) -> None:
        """Follow the calls of the modules around the layers."""
        for module in self._around:
            self._handle.add(module.register_forward_pre_hook(ModuleHook(self._begin), prepend=True).remove)
            self._handle.add(module.register_forward_hook(ModuleHook(self._end), always_call=True).remove)

    def close(self) -> None:
        """Remove all hooks, and forget what was found. Hooks on tensors stay as long as these, and do nothing."""
        self._handle.remove()
        self._closed = True
        self._found.clear()
        self._latest.clear()
        self._running = _CallStack()

    def wants(self, layer: str) -> bool:
        """Return whether a call that is made now could be the one to measure."""
        if not torch.is_grad_enabled():
            return False
        if layer not in self._found:
            return True
        (_, first), _ = self._found[layer]
        # Recomputations come in the opposite order of the calls: within one backward pass the last is the first call.
        return self._backwards.get(_backward()) == first

    def latest(self, layer: str) -> Candidate[Result] | None:
        """Return the last candidate of a layer, if it may still get a gradient."""
        reference = self._latest.get(layer)
        return None if reference is None else reference()

    def add(self, candidate: Candidate[Result], module: nn.Module, output: Any) -> None:
        """Take in a call that `wants` has allowed.

        Args:
            candidate: what was read in it.
            module: the layer.
            output: what the call returned.
        """
        candidate.backward = _backward()
        around = (module, *(frame.module for frame in reversed(self._running.frames)))
        candidate.parameters = next(filter(None, map(_gradient_nodes, around)), ())
        self._latest[candidate.layer] = weakref.ref(candidate)
        outputs = list(_with_graph(output))
        if outputs:
            self._follow(outputs, [candidate], by_module=False)
        elif self._running.frames:
            self._running.frames[-1].candidates.append(candidate)

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._running.frames.append(_Frame(module, []))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        candidates = self._running.frames.pop().candidates if self._running.frames else []
        if not candidates:
            return
        outputs = list(_with_graph(output))
        if outputs:
            self._follow(outputs, candidates, by_module=True)
        elif self._running.frames:
            self._running.frames[-1].candidates.extend(candidates)

    def _follow(self, outputs: list[torch.Tensor], candidates: list[Candidate[Result]], *, by_module: bool) -> None:
        for output in outputs:
            output.register_hook(partial(self._arrived, candidates, by_module))  # type: ignore[no-untyped-call]

    def _arrived(self, candidates: list[Candidate[Result]], by_module: bool, gradient: torch.Tensor) -> None:
        try:
            for candidate in candidates:
                self._choose(candidate, by_module)
        except Exception:  # never into the backward pass
            logger.debug("ess_monitor: a gradient could not be followed", exc_info=True)

    def _choose(self, candidate: Candidate[Result], by_module: bool) -> None:
        if self._closed or not _reaches(candidate.parameters):
            return
        backward = _backward() if candidate.backward == _NO_BACKWARD else candidate.backward
        key = (by_module, self._backwards.setdefault(backward, len(self._backwards)))
        if candidate.layer not in self._found or key <= self._found[candidate.layer][0]:
            self._found[candidate.layer] = (key, candidate)


class _Frame(NamedTuple):
    """A call that is running of a module around layers."""

    module: nn.Module
    candidates: list[Candidate[Any]]
    """The calls inside it whose output requires no gradient."""


class _CallStack(threading.local):
    """The calls of modules around layers that are running in this thread, innermost last."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []


def modules_around(model: nn.Module, layers: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    """Return the modules of a model that hold any of the layers, in model order."""
    names = dict(model.named_modules())
    wanted = {id(layer) for layer in layers}
    above = {
        name.rsplit(".", k)[0] if k <= name.count(".") else ""
        for name, module in names.items()
        if id(module) in wanted and name
        for k in range(1, name.count(".") + 2)
    }
    return tuple(module for name, module in names.items() if name in above)


def _with_graph(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a call's output that have a graph.

    Of a view its base: when a view is written to in place, the node before it leaves the graph.

    >>> x = torch.ones(2, requires_grad=True)
    >>> [tensor.shape for tensor in _with_graph({"y": (2 * x, x, None), "n": 3})]
    [torch.Size([2])]
    """
    if isinstance(value, torch.Tensor):
        base = value._base if value._is_view() else None
        value = value if base is None or base.grad_fn is None else base
        if value.grad_fn is not None:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _with_graph(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _with_graph(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for part in dataclasses.fields(value):
            yield from _with_graph(getattr(value, part.name, None))


def _gradient_nodes(module: nn.Module) -> tuple[Node, ...]:
    # Looked up in the call: FSDP puts the whole parameters there for the time of a forward pass.
    tensors = (tensor for each in module.modules() for tensor in each._parameters.values() if tensor is not None)
    trained = itertools.islice((tensor for tensor in tensors if tensor.requires_grad), _MOST_PARAMETERS)
    return tuple(get_gradient_edge(tensor).node for tensor in trained)


def _reaches(parameters: tuple[Node, ...]) -> bool:
    """Return whether the running backward pass goes on to any of these; True where there are none.

    A gradient with respect to an input (an attack, a force, a penalty) ends before them.
    """
    return not parameters or any(map(_is_reached, parameters))


def _is_reached(node: Node) -> bool:
    will_execute: Callable[[Node], bool] | None = getattr(torch._C, "_will_engine_execute_node", None)
    if will_execute is None:  # private, and known for the versions of torch that are supported
        return True
    try:
        return will_execute(node)
    except RuntimeError:  # the parameter itself was asked for, by `torch.autograd.grad`
        return True


def _backward() -> int:
    """Return the number of the backward pass that is running in this thread."""
    number: Callable[[], int] | None = getattr(torch._C, "_current_graph_task_id", None)
    return _NO_BACKWARD if number is None else number()
