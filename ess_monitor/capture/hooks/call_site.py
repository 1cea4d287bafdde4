"""Where in a layer the call happens that is read or changed: one way to stand there, whatever kind of call it is.

Two kinds. The call of a sub-module, seen by module hooks. And the call of a *functional op* that the layer's code makes
through a global name, seen by a tap on that name; which layer it belongs to follows from hooks that note when a layer's
own forward begins and ends.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ess_monitor.capture.hooks.function_patch import StandIn, add_listener, function_stand_in

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Call:
    """One call at a site, with what it was called with."""

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
    """Keyword arguments of the layer's own call (attention masks, packing), where that is not the call itself."""
    entry: int = 0
    """Of an op: which forward call of the layer made it."""
    began: int = 0
    ended: int = 0
    """Of an op: when the call was made and when it returned, counted over all of them. One op may call another."""


Before = Callable[[Call], "Arguments | None"]
"""Sees a call before it is made; returns other arguments, or None for none."""
After = Callable[[Call], None]
"""Sees a call with its output."""


@dataclass(frozen=True)
class Op:
    """A global name, and the namespaces in which a layer's code looks it up."""

    name: str
    namespaces: tuple[dict[str, Any], ...] = field(repr=False)
    make: StandIn = field(default=function_stand_in, repr=False)


class _Hook:
    """A module hook of ours. A pickled or deep-copied model gets one that does nothing: the copy is not the model that
    is watched, and what the hook refers to cannot be pickled."""

    def __init__(self, function: Callable[..., Any] | None) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if self._function is None else self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None,)


class HookHandle:
    """Hooks and taps that stand somewhere until `remove` is called."""

    def __init__(self) -> None:
        self._removers: list[Callable[[], None]] = []

    @property
    def active(self) -> bool:
        """True until `remove`."""
        return bool(self._removers)

    def add(self, remove: Callable[[], None]) -> None:
        """Something more to take away."""
        self._removers.append(remove)

    def remove(self) -> None:
        """Leave no trace. A second call does nothing."""
        while self._removers:
            self._removers.pop()()


@dataclass(frozen=True)
class CallSite:
    """The place of a call in a layer: a sub-module's, or that of any of some ops.

    `path` counts where there are no ops; empty means the layer itself.
    """

    path: str = ""
    ops: tuple[Op, ...] = ()

    def watch(self, layer: nn.Module, *, before: Before | None = None, after: After | None = None) -> HookHandle:
        """Stand at this site of `layer`. Exceptions of `before` and `after` go through to the layer's caller."""
        watch = HookHandle()
        try:
            (self._watch_ops if self.ops else self._watch_module)(watch, layer, before, after)
        except BaseException:
            watch.remove()
            raise
        return watch

    def _watch_module(self, watch: HookHandle, layer: nn.Module, before: Before | None, after: After | None) -> None:
        module = layer.get_submodule(self.path)
        if module is not layer:
            _Entered(layer).watch(watch)
        if before is not None:
            ask = before

            def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                return ask(Call(layer, module, "", args, kwargs, layer_kwargs=_kwargs_of(layer)))

            watch.add(module.register_forward_pre_hook(_Hook(pre_hook), with_kwargs=True).remove)
        if after is not None:
            tell = after

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                tell(Call(layer, module, "", args, kwargs, output, layer_kwargs=_kwargs_of(layer)))

            watch.add(module.register_forward_hook(_Hook(hook), with_kwargs=True).remove)

    def _watch_ops(self, watch: HookHandle, layer: nn.Module, before: Before | None, after: After | None) -> None:
        _Entered(layer).watch(watch)
        for op in self.ops:
            listener = _OpListener(layer, op.name, before, after)
            for namespace in op.namespaces:
                watch.add(add_listener(namespace, op.name, listener, op.make))


class _UnderWay(threading.local):
    """The watched layers whose forward is running in this thread, innermost last."""

    def __init__(self) -> None:
        self.entered: list[tuple[nn.Module, object, dict[str, Any], int]] = []
        """(layer, who noted it, keyword arguments, number)"""


_UNDER_WAY = _UnderWay()
_COUNT = itertools.count(1)


def _kwargs_of(layer: nn.Module) -> dict[str, Any]:
    """Keyword arguments of the innermost call of `layer` that is under way."""
    return next((kwargs for entered, _, kwargs, _ in reversed(_UNDER_WAY.entered) if entered is layer), {})


class _Entered:
    """Notes when a layer's forward begins and ends."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def watch(self, watch: HookHandle) -> None:
        """Attach the hooks that do so."""
        watch.add(self._layer.register_forward_pre_hook(_Hook(self.begin), with_kwargs=True, prepend=True).remove)
        # Called after an exception too: the recomputation of a checkpointed layer ends early with one.
        watch.add(self._layer.register_forward_hook(_Hook(self.end), always_call=True).remove)
        watch.add(self.forget)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _UNDER_WAY.entered.append((self._layer, self, kwargs, next(_COUNT)))

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for k in range(len(_UNDER_WAY.entered) - 1, -1, -1):
            if _UNDER_WAY.entered[k][1] is self:
                del _UNDER_WAY.entered[k:]  # what is above it did not end properly
                return

    def forget(self) -> None:
        _UNDER_WAY.entered[:] = [entry for entry in _UNDER_WAY.entered if entry[1] is not self]


class _OpListener:
    """Passes on the calls that one layer makes of one op."""

    def __init__(self, layer: nn.Module, name: str, before: Before | None, after: After | None) -> None:
        self._layer, self._name = layer, name
        self._before, self._after = before, after

    def __call__(
        self, original: Callable[..., Any], proceed: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not _UNDER_WAY.entered or _UNDER_WAY.entered[-1][0] is not self._layer:
            return proceed(args, kwargs)
        try:
            signature = inspect.signature(original)
            named = named_arguments(signature, args, kwargs)
        except (TypeError, ValueError):  # a builtin that does not say what it takes: nothing to read, and not our call
            return proceed(args, kwargs)
        _, _, layer_kwargs, entry = _UNDER_WAY.entered[-1]
        call = Call(
            layer=self._layer,
            module=self._layer,
            op=self._name,
            kwargs=named,
            layer_kwargs=layer_kwargs,
            entry=entry,
            began=next(_COUNT),
        )
        if self._before is not None:
            changed = self._before(call)
            if changed is not None:
                args, kwargs = with_named_arguments(signature, args, kwargs, changed[1])
        output = proceed(args, kwargs)
        if self._after is not None:
            self._after(dataclasses.replace(call, output=output, ended=next(_COUNT)))
        return output


def named_arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every argument of a call by its name: defaults filled in, `**kwargs` spread out.

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
    """The arguments of a call with those that differ in `named` in their place; the others stay as they were given.

    >>> with_named_arguments(inspect.signature(lambda a, b=2, **more: None), (1,), {"c": 3}, {"a": 5, "b": 2, "c": 4})
    ((5,), {'c': 4})
    """
    before = named_arguments(signature, args, kwargs)
    changed = {name: value for name, value in named.items() if name not in before or before[name] is not value}
    names = [name for name, p in signature.parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    positional = tuple(changed.pop(name, value) for name, value in zip(names, args, strict=False)) + args[len(names) :]
    return positional, {**kwargs, **changed}
