"""Runs Triton kernels without an accelerator, in Triton's interpreter with the missing features added.

Triton reads TRITON_INTERPRET when a kernel is *defined*, so it has to be set before triton is imported. What the
interpreter lacks is replaced, in this process and only on request:

- the autotuner does no timing and takes the first configuration of a kernel;
- kernels of fla call `i.to(dtype)` on the counter of a `range` loop, which is a plain int in the interpreter: the
  modules with kernels get a `range` whose numbers have that method;
- numpy, which computes for the interpreter, does not warn about overflow in masked elements, as a device does not;
- functions called by a kernel do not search all of triton.language again, which would take a third of the time.
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
    """Import `package`, and make its kernels run without a device. A second call has no effect.

    Raises:
        RuntimeError: triton was imported without the variable, so its functions are compiled ones.
    """
    if "triton" not in sys.modules and not torch.cuda.is_available():
        os.environ.setdefault(VARIABLE, "1")
        os.environ.setdefault("FLA_USE_COMPILE", "0")  # compiling a few sums would take half a minute
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
    """Return the same time for all configurations, so that the first one wins."""
    return 0.0


def _quiet(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def quiet(*args: Any, **kwargs: Any) -> Any:
        with numpy.errstate(all="ignore"):
            return call(*args, **kwargs)

    return quiet


def _patch_once(patch: Callable[..., None], known: dict[int, str], package: Any, builder: Any, scope: Any) -> None:
    """Call `patch`, which replaces every builtin of `package`, unless one is replaced already."""
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
    """A `range` whose numbers have a method `to`."""

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
