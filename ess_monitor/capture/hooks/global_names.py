"""Find the global names that a layer's code uses, without calling it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Hashable, Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any, cast

from torch import nn


def names_used(layer: type[nn.Module]) -> dict[str, tuple[dict[str, Any], ...]]:
    """Return every name that the methods of `layer` look up, with the namespaces they look in.

    Base classes of torch and overridden methods are left out.

    >>> class Layer(nn.Module):
    ...     def forward(self, x):
    ...         return inspect.cleandoc(x)
    >>> "cleandoc" in names_used(Layer), "forward" in names_used(Layer)
    (True, False)
    """
    return _names_used(cast(Hashable, layer))


@cache
def _names_used(layer: Any) -> dict[str, tuple[dict[str, Any], ...]]:
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for function in _methods(layer):
        for name in _names(function.__code__):
            found.setdefault(name, {})[id(function.__globals__)] = function.__globals__
    return {name: tuple(namespaces.values()) for name, namespaces in found.items()}


def _methods(layer: type[nn.Module]) -> Iterator[FunctionType]:
    own: dict[str, Any] = {}
    for cls in layer.__mro__:
        if cls.__module__.partition(".")[0] not in ("torch", "builtins"):
            own = {**own, **{name: value for name, value in vars(cls).items() if name not in own}}
    for name, value in own.items():
        yield from _unwrapped(name, value)


def _unwrapped(name: str, method: Any) -> Iterator[FunctionType]:
    """Yield the function of a method, and what a decorator that does not say so has wrapped in it."""
    function = inspect.unwrap(getattr(method, "__func__", method)) if callable(method) else None
    if not isinstance(function, FunctionType):
        return
    yield function
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a cell that is still empty
            if getattr(cell.cell_contents, "__name__", None) == name:
                yield from _unwrapped(name, cell.cell_contents)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # functions and comprehensions inside
            yield from _names(constant)
