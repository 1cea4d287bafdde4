"""Standing in for a function that a library reaches through a global name.

Layers of transformers, fla and mamba_ssm call their kernels as module globals (`mamba_selective_scan`, `chunk_gla`), so
putting another function under that name shows every call with the arguments the layer really used, on every kernel
path, without touching the library's files. Several listeners may stand at one name (two monitors, a sample and a
regularizer); when the last one leaves, the original object is back under its name.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

Proceed = Callable[[tuple[Any, ...], dict[str, Any]], Any]
"""Calls the original, or the listener behind."""

Listener = Callable[[Callable[..., Any], Proceed, tuple[Any, ...], dict[str, Any]], Any]
"""`(original, proceed, args, kwargs) -> output`: sees one call and returns what `proceed` gave."""

StandIn = Callable[[Any, Callable[..., Any]], Any]
"""`(original, called) -> object`: what is put under the name. It must call `called(function, args, kwargs)` for every
call of a function behind the name."""


def function_stand_in(original: Any, called: Callable[..., Any]) -> Any:
    """A function in place of a function."""

    @functools.wraps(original)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return called(original, args, kwargs)

    return stand_in


class _Tap:
    """One name with its listeners."""

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
        # Somebody may have put a function of their own over ours in the meantime: then theirs stays, and ours behind
        # it passes every call on.
        if self.namespace.get(self.name) is self.stand_in:
            self.namespace[self.name] = self.original


_TAPS: dict[tuple[int, str], _Tap] = {}
"""By identity of the namespace and name. Process-wide, as the names themselves are."""
_LOCK = threading.Lock()


def add_listener(
    namespace: dict[str, Any], name: str, listener: Listener, make: StandIn = function_stand_in
) -> Callable[[], None]:
    """Let `listener` see every call of the function under `name`.

    Args:
        namespace: the globals that hold the name: `vars(module)` or `function.__globals__`.
        name: under which the function is called.
        listener: stands around the call; it must pass the call on exactly once.
        make: builds what is put under the name.

    Returns:
        A function that takes the listener away; a second call of it does nothing.
    """
    key = (id(namespace), name)
    with _LOCK:
        tap = _TAPS.get(key)
        if tap is None:
            tap = _TAPS[key] = _Tap(namespace, name, make)
        tap.listeners = (*tap.listeners, listener)

    def remove() -> None:
        with _LOCK:
            tap.listeners = tuple(other for other in tap.listeners if other is not listener)
            if not tap.listeners and _TAPS.get(key) is tap:
                del _TAPS[key]
                tap.restore()

    return remove
