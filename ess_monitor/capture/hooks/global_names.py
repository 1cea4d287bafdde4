"""Which global names a layer's code uses, read off its functions without calling them."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any, cast

from torch import nn


def names_used(layer: type[nn.Module]) -> dict[str, tuple[dict[str, Any], ...]]:
    """Every name that the methods of `layer` look up, with the namespaces they look in. Base classes of torch are left
    out, methods that are overridden are not called and are left out too.

    >>> class Layer(nn.Module):
    ...     def forward(self, x):
    ...         return inspect.cleandoc(x)
    >>> "cleandoc" in names_used(Layer), "forward" in names_used(Layer)
    (True, False)
    """
    return _names_used(cast(Hashable, layer))


@cache
def _names_used(layer: Any) -> dict[str, tuple[dict[str, Any], ...]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for function in _methods(layer):
        for name in _names(function.__code__):
            namespaces = found.setdefault(name, [])
            if not any(function.__globals__ is other for other in namespaces):
                namespaces.append(function.__globals__)
    return {name: tuple(namespaces) for name, namespaces in found.items()}


def _methods(layer: type[nn.Module]) -> Iterator[FunctionType]:
    seen: set[str] = set()
    for cls in layer.__mro__:
        if cls.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for name, value in vars(cls).items():
            if name in seen:
                continue
            seen.add(name)
            function = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else None
            if isinstance(function, FunctionType):
                yield function


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # functions and comprehensions inside
            yield from _names(constant)
