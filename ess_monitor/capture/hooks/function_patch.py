"""Patch a function that a library reaches through a global name.

Layers of transformers, fla and mamba_ssm call their kernels as module globals (`mamba_selective_scan`, `chunk_gla`).
Another function under that name sees every call with the arguments that the layer used, on every kernel path, and the
library's files stay untouched. Several listeners may share a name (two monitors, a sample and a regularizer). When the
last one is removed, the original object is back under its name.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

Proceed = Callable[[tuple[Any, ...], dict[str, Any]], Any]
"""Calls the next listener, or the original after the last one."""

Listener = Callable[[Callable[..., Any], Proceed, tuple[Any, ...], dict[str, Any]], Any]
"""`(original, proceed, args, kwargs) -> output`: sees one call and returns what `proceed` gave."""

StandIn = Callable[[Any, Callable[..., Any]], Any]
"""`(original, called) -> object`: builds what is put under the name. The object must call
`called(function, args, kwargs)` for every call of a function that the name leads to."""


def function_stand_in(original: Any, called: Callable[..., Any]) -> Any:
    """Build a function that replaces a function."""

    @functools.wraps(original)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return called(original, args, kwargs)

    return stand_in


class AttributeStandIn:
    """Replaces a function that is an attribute of a layer; a pickled or deep-copied layer has the function."""

    def __init__(self, original: Any, called: Callable[..., Any]) -> None:
        self._original, self._called = original, called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._called(self._original, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._original,)


def _itself(original: Any) -> Any:
    return original


class _Patch:
    """Puts a stand-in under one name and passes its calls through the listeners."""

    def __init__(self, namespace: dict[str, Any], name: str, make: StandIn) -> None:
        self.namespace, self.name = namespace, name
        self.original = namespace[name]
        self.listeners: tuple[Listener, ...] = ()
        self.stand_in = make(self.original, self._called)
        namespace[name] = self.stand_in

    def _called(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._proceed(function, self.listeners)(args, kwargs)

    def _proceed(self, function: Callable[..., Any], listeners: tuple[Listener, ...]) -> Proceed:
        if not listeners:
            return lambda args, kwargs: function(*args, **kwargs)
        following = self._proceed(function, listeners[1:])
        return lambda args, kwargs: listeners[0](function, following, args, kwargs)

    def restore(self) -> None:
        # If somebody else has patched the name since, their function stays and ours passes its calls on.
        if self.namespace.get(self.name) is self.stand_in:
            self.namespace[self.name] = self.original


_PATCHES: dict[tuple[int, str], _Patch] = {}
"""By identity of the namespace and name. Process-wide, as the names themselves are."""
_LOCK = threading.Lock()


def add_listener(
    namespace: dict[str, Any], name: str, listener: Listener, make: StandIn = function_stand_in
) -> Callable[[], None]:
    """Let `listener` see every call of the function under `name`.

    Args:
        namespace: the globals that hold the name: `vars(module)` or `function.__globals__`.
        name: the name under which the function is called.
        listener: called around each call; it must pass the call on exactly once.
        make: builds what is put under the name.

    Returns:
        A function that removes the listener; a second call of it does nothing.
    """
    key = (id(namespace), name)
    with _LOCK:
        patch = _PATCHES.get(key)
        if patch is None:
            patch = _PATCHES[key] = _Patch(namespace, name, make)
        patch.listeners = (*patch.listeners, listener)

    def remove() -> None:
        with _LOCK:
            patch.listeners = tuple(other for other in patch.listeners if other is not listener)
            if not patch.listeners and _PATCHES.get(key) is patch:
                del _PATCHES[key]
                patch.restore()

    return remove
