"""Watch one call inside a layer, read it, and change its arguments.

The call is that of a sub-module, seen by module hooks, or that of a *functional op*: a function that the layer's code
reaches through a global name, seen by a patch of that name. Hooks on the layer note when its own forward begins and
ends, which tells the layer that an op's call belongs to.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ess_monitor.capture.hooks.function_patch import Listener, StandIn, add_listener, function_stand_in

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments or outputs, in lists, tuples and dictionaries to any depth.

    >>> [len(found) for found in tensors_in((Tensor([0]), {"mask": Tensor([0, 1])}, "text"))]
    [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


@dataclass(frozen=True)
class Call:
    """One call at a site and its arguments."""

    layer: nn.Module
    """The sequence mixer."""
    module: nn.Module
    """What was called: a sub-module, or the layer itself. For an op, the layer whose code called it."""
    op: str = ""
    """Name of the op; empty for a sub-module."""
    args: tuple[Any, ...] = ()
    """Positional arguments of a sub-module's call; empty for an op."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a sub-module's call. For an op *every* argument by its name, defaults included."""
    output: Any = None
    """What the call returned; None before it."""
    layer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the layer's own call (attention masks, packing), where that is another call."""
    forward_number: int = 0
    """Number of the layer's forward call that made an op's call, -1 in compiled code; 0 for a sub-module."""
    start_number: int = 0
    end_number: int = 0
    """When an op was called and when it returned, counted in its forward call. An op may call another one."""


Before = Callable[[Call], "Arguments | None"]
"""Sees a call before it is made. Returns the arguments to make it with, or None to leave them."""
After = Callable[[Call], None]
"""Sees a call with its output."""


@dataclass(frozen=True)
class Op:
    """A global name, and the namespaces in which a layer's code looks it up."""

    name: str
    namespaces: tuple[dict[str, Any], ...] = field(repr=False)
    stand_in: StandIn = field(default=function_stand_in, repr=False)


class ModuleHook:
    """A module hook that does nothing in a pickled or deep-copied model, in whose file is nothing of this package.

    The copy is not watched, and what the hook refers to cannot be pickled. Every hook on a module of the model is one.

    It does nothing either once it was removed within the call that it belongs to, by a signal handler that closes the
    monitor: PyTorch still calls it then, but without the keyword arguments.

    Examples:
        >>> import pickle
        >>> model = nn.Linear(2, 2)
        >>> handle = model.register_forward_pre_hook(ModuleHook(lambda module, args: print("called")))
        >>> b"ess_monitor" in pickle.dumps(model)
        False
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._least = _least_arguments(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs) if len(args) >= self._least else None

    def __reduce__(self) -> tuple[Any, ...]:
        # PyTorch cannot leave a hook out of a copy. This is a method of Python's own that takes anything and returns
        # None.
        return getattr, (nullcontext(), "__exit__")


def _least_arguments(function: Callable[..., Any]) -> int:
    """Return how many positional arguments a Python function cannot do without, as far as that is known."""
    inner = inspect.unwrap(function)
    code = getattr(inner, "__code__", None)
    if code is None:
        return 0
    return int(code.co_argcount) - len(inner.__defaults__ or ()) - inspect.ismethod(inner)


def is_own_hook(hook: object) -> bool:
    """Return whether a hook on a module is one of this package, or what is left of one in a copy."""
    return isinstance(hook, ModuleHook) or getattr(hook, "__func__", None) is nullcontext.__exit__


class HookHandle:
    """Removes the hooks and patches that were added to it."""

    def __init__(self) -> None:
        self._removers: list[Callable[[], None]] = []

    @property
    def active(self) -> bool:
        """True until `remove`."""
        return bool(self._removers)

    def add(self, remove: Callable[[], None]) -> None:
        """Call `remove` when this handle is removed."""
        self._removers.append(remove)

    def remove(self) -> None:
        """Remove everything, last added first. A second call does nothing."""
        while self._removers:
            self._removers.pop()()


@dataclass(frozen=True)
class CallSite:
    """The call to watch in a layer: that of a sub-module, or that of any of several ops."""

    path: str = ""
    """Sub-module below the layer; empty for the layer itself. Unused where there are ops."""
    ops: tuple[Op, ...] = ()

    def watch(self, layer: nn.Module, *, before: Before | None = None, after: After | None = None) -> HookHandle:
        """Call `before` and `after` around each call at this site. Their exceptions reach the layer's caller."""
        handle = HookHandle()
        try:
            (self._watch_ops if self.ops else self._watch_module)(handle, layer, before, after)
        except BaseException:
            handle.remove()
            raise
        return handle

    def _watch_module(self, handle: HookHandle, layer: nn.Module, before: Before | None, after: After | None) -> None:
        module = layer.get_submodule(self.path)
        if module is not layer:
            _track_forward(layer, handle)

        def call(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Call:
            # `called` is a copy of the sub-module where DataParallel replicates the model.
            return Call(layer, called, "", args, kwargs, output, layer_kwargs=_running_kwargs(layer))

        if before is not None:
            pre_hook = ModuleHook(lambda called, args, kwargs: before(call(called, args, kwargs)))
            handle.add(module.register_forward_pre_hook(pre_hook, with_kwargs=True).remove)
        if after is not None:
            hook = ModuleHook(lambda called, args, kwargs, output: after(call(called, args, kwargs, output)))
            handle.add(module.register_forward_hook(hook, with_kwargs=True).remove)

    def _watch_ops(self, handle: HookHandle, layer: nn.Module, before: Before | None, after: After | None) -> None:
        _track_forward(layer, handle)
        for op in self.ops:
            listener = _op_listener(layer, op.name, before, after)
            for namespace in op.namespaces:
                handle.add(add_listener(namespace, op.name, listener, op.stand_in))


class _Forward(NamedTuple):
    """A forward call of a watched layer that is running."""

    layer: nn.Module
    handle: HookHandle
    """Of the hooks that noted the call."""
    kwargs: dict[str, Any]
    number: int
    events: list[str]
    """Names of the ops that have begun and ended in it."""


class _Running(threading.local):
    """The forward calls of watched layers that are running in this thread, innermost last."""

    def __init__(self) -> None:
        self.forwards: list[_Forward] = []


_RUNNING = _Running()
_COUNT = itertools.count(1)


def _running_kwargs(layer: nn.Module) -> dict[str, Any]:
    """Return the keyword arguments of the innermost running call of `layer`."""
    return next((forward.kwargs for forward in reversed(_RUNNING.forwards) if forward.layer is layer), {})


def _track_forward(layer: nn.Module, handle: HookHandle) -> None:
    """Add the hooks that note when the layer's forward begins and ends."""

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Code that is compiled with a count would be compiled again whenever the count has changed.
        number = -1 if torch.compiler.is_compiling() else next(_COUNT)
        _RUNNING.forwards.append(_Forward(layer, handle, kwargs, number, []))

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for k in range(len(_RUNNING.forwards) - 1, -1, -1):
            if _RUNNING.forwards[k].handle is handle:
                del _RUNNING.forwards[k:]  # calls inside it that have not ended never will
                return

    def forget() -> None:
        _RUNNING.forwards[:] = [forward for forward in _RUNNING.forwards if forward.handle is not handle]

    handle.add(layer.register_forward_pre_hook(ModuleHook(begin), with_kwargs=True, prepend=True).remove)
    # Called after an exception too: the recomputation of a checkpointed layer ends early with one.
    handle.add(layer.register_forward_hook(ModuleHook(end), always_call=True).remove)
    handle.add(forget)


def _op_listener(layer: nn.Module, name: str, before: Before | None, after: After | None) -> Listener:
    """Build the listener that sees the calls which `layer` makes of the op `name`."""

    def listen(original: Callable[..., Any], proceed: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _RUNNING.forwards or _RUNNING.forwards[-1].layer is not layer:
            return proceed(args, kwargs)
        try:
            signature = inspect.signature(original)
            named = named_arguments(signature, args, kwargs)
        except (TypeError, ValueError):  # a builtin without a signature cannot be read
            return proceed(args, kwargs)
        _, _, layer_kwargs, number, events = _RUNNING.forwards[-1]
        events.append(name)
        start = len(events)
        call = Call(layer, layer, name, (), named, None, layer_kwargs, forward_number=number, start_number=start)
        changed = None if before is None else before(call)
        if changed is not None:
            args, kwargs = with_named_arguments(signature, args, kwargs, changed[1])
        output = proceed(args, kwargs)
        events.append(name)
        if after is not None:
            after(dataclasses.replace(call, output=output, end_number=len(events)))
        return output

    return listen


def named_arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return every argument of a call by its name: defaults filled in, `**kwargs` spread out.

    >>> named_arguments(inspect.signature(lambda a, b=2, **more: None), (1,), {"c": 3})
    {'a': 1, 'b': 2, 'c': 3}
    """
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return named


def with_named_arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], named: Mapping[str, Any]
) -> Arguments:
    """Return a call's arguments with the changed ones of `named` in place; the others stay as they were passed.

    >>> with_named_arguments(inspect.signature(lambda a, b=2, **more: None), (1,), {"c": 3}, {"a": 5, "b": 2, "c": 4})
    ((5,), {'c': 4})
    """
    before = named_arguments(signature, args, kwargs)
    changed = {name: value for name, value in named.items() if name not in before or before[name] is not value}
    names = [name for name, p in signature.parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    positional = tuple(changed.pop(name, value) for name, value in zip(names, args, strict=False)) + args[len(names) :]
    return positional, {**kwargs, **changed}
