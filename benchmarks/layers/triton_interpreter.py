"""Triton kernels on a machine without an accelerator: run by Triton's interpreter, with what it lacks filled in.

Triton reads TRITON_INTERPRET when a kernel is *defined*, so it has to be set before triton is imported. What the
interpreter then lacks is replaced, in this process and only when it is asked for:

- the autotuner times nothing: the first configuration of a kernel is taken;
- kernels of fla say `i.to(dtype)` to the counter of a `range` loop, which under the interpreter is a plain int: the
  modules with kernels get a `range` whose numbers have that method;
- numpy, which computes for the interpreter, is silent about overflow in lanes that are masked out, as a device is;
- functions called by a kernel do not look through all of triton.language again (a third of the time otherwise).
"""

from __future__ import annotations

import builtins
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch

VARIABLE = "TRITON_INTERPRET"


def interpret_triton(package: str) -> None:
    """Make the kernels of `package`, imported by then, run without a device. A second call does nothing.

    Raises:
        RuntimeError: triton was imported without the variable, so that its functions are compiled ones.
    """
    if "triton" not in sys.modules and not torch.cuda.is_available():
        os.environ.setdefault(VARIABLE, "1")
        os.environ.setdefault("FLA_USE_COMPILE", "0")  # a few sums, which would be compiled for half a minute
    import triton
    from triton.runtime import interpreter
    from triton.runtime.autotuner import Autotuner

    if not isinstance(triton.language.cdiv, interpreter.InterpretedFunction):
        raise RuntimeError(
            f"{VARIABLE}: triton was imported without it, so its kernels need an accelerator; set {VARIABLE}=1 in the "
            "environment before the program starts"
        )
    importlib.import_module(package)
    if Autotuner._bench is not _no_timing:
        Autotuner._bench = _no_timing
        interpreter._patch_builtin = functools.partial(_patch_once, interpreter._patch_builtin, {})
        interpreter.GridExecutor.__call__ = _quiet(interpreter.GridExecutor.__call__)
    for name, module in list(sys.modules.items()):
        if module is not None and (name == package or name.startswith(f"{package}.")):
            vars(module).setdefault("range", CountersWithTo)


def _no_timing(self: Any, *args: Any, config: Any, **meta: Any) -> float:
    """All configurations take the same time, so the first one wins."""
    return 0.0


def _quiet(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def quiet(*args: Any, **kwargs: Any) -> Any:
        with numpy.errstate(all="ignore"):
            return call(*args, **kwargs)

    return quiet


def _patch_once(patch: Callable[..., None], known: dict[int, str], package: Any, builder: Any, scope: Any) -> None:
    """`patch` replaces every builtin of `package`, and does nothing where one is replaced already."""
    from triton.language.core import is_builtin

    if id(package) not in known:
        known[id(package)] = next((name for name, member in inspect.getmembers(package) if is_builtin(member)), "")
    name = known[id(package)]
    if name and is_builtin(getattr(package, name)):
        patch(package, builder, scope)


class _Counter(int):
    def to(self, dtype: Any) -> _Counter:
        return self


class CountersWithTo:
    """`range`, whose numbers have a method `to`."""

    def __init__(self, *bounds: Any) -> None:
        self._range = builtins.range(*bounds)

    def __iter__(self) -> Iterator[_Counter]:
        return map(_Counter, self._range)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._range, name)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: Any) -> Any:
        return self._range[index]
