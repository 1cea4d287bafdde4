"""Make hooks work on compiled models: compiled code ignores what is attached after its first call."""

from __future__ import annotations

import re
import sys
import threading
import weakref
from collections.abc import Hashable
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from ess_monitor.capture.hooks.global_names import names_used

_COMPILER = "torch._dynamo"
"""Imported by the first torch.compile, or optimizer, of a process."""

_HOLDERS: list[object] = []
_STANCE_BEFORE: list[Any] = []
"""Restores the stance that was set before the first holder; empty without one. Process-wide, as the stance itself."""
_LOCK = threading.RLock()
"""Reentrant: the garbage collector releases a dropped holder, and may run anywhere."""


class EagerStance:
    """Runs compiled modules as they were written between `begin` and `end`, so that hooks and patches see their calls.

    Compiled code is kept and used again afterwards, without another compilation. It rounds differently from the code
    as written: a sampled step of a compiled model can differ in the last bits.

    Several objects may hold the stance and end in any order. The last one to end, or to be dropped without an end,
    restores the stance before the first. It is set whether or not anything is compiled yet: a model that is compiled
    while a sample is armed is then not traced with hooks.
    """

    def __init__(self) -> None:
        self._release: weakref.finalize[[object], EagerStance] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return EagerStance, ()

    def begin(self) -> None:
        """Run compiled code eagerly. A second call does nothing."""
        if self._release is not None and self._release.alive:
            return
        holder = object()
        with _LOCK:
            if not _HOLDERS:
                _STANCE_BEFORE.append(torch.compiler.set_stance("force_eager"))
            _HOLDERS.append(holder)
        self._release = weakref.finalize(self, _release_holder, holder)
        self._release.atexit = False

    def end(self) -> None:
        """Restore the stance before, unless another object holds this one. A second call does nothing."""
        if self._release is not None:
            self._release()


def has_compiled() -> bool:
    """Return whether `torch.compile` has compiled anything in this process."""
    counters = getattr(sys.modules.get(f"{_COMPILER}.utils"), "counters", {})
    return bool(counters.get("frames", {}).get("ok", 0))


_FLEX = re.compile(r"flex_?att(?!\w*mask)")


def runs_flex_attention(model: nn.Module) -> bool:
    """Return whether a module's code calls flex attention, by the names in it and by transformers' configurations.

    Run as it is written it holds the scores of all pairs of tokens: gigabytes, where compiled code needs none.

    Examples:
        >>> class Layer(nn.Module):
        ...     def forward(self, q):
        ...         return flex_attention(q, q, q)
        >>> runs_flex_attention(nn.Sequential(Layer())), runs_flex_attention(nn.Sequential(nn.Linear(2, 2)))
        (True, False)
    """
    return any(_is_flex(module) for module in model.modules())


def _is_flex(module: nn.Module) -> bool:
    kernel = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return kernel == "flex_attention" if kernel else _names_flex(cast(Hashable, type(module)))


@cache
def _names_flex(layer: Any) -> bool:
    """Return whether the code of a class names flex attention; looked for once, as it is asked at every sample."""
    return any(map(_FLEX.search, names_used(layer)))


def _release_holder(holder: object) -> None:
    with _LOCK:
        _HOLDERS.remove(holder)
        if not _HOLDERS:
            _STANCE_BEFORE.pop().__exit__(None, None, None)


_HOOK_SETTINGS = {"skip_nnmodule_hook_guards": False}
"""Settings with which the compiler notices hooks on some of many layers."""

_SEEN_BY_COMPILER: list[object] = []
_SETTINGS_BEFORE: dict[str, Any] = {}


def compile_with(holder: object) -> None:
    """Compile everything again, now with the hooks and patches of `holder`, which must be attached already.

    Undone by `compile_without`, after the hooks have been removed.
    """
    if _COMPILER not in sys.modules:
        return
    config = sys.modules[_COMPILER].config
    if not _SEEN_BY_COMPILER:
        _SETTINGS_BEFORE.update({name: getattr(config, name) for name in _HOOK_SETTINGS if hasattr(config, name)})
        for name in _SETTINGS_BEFORE:
            setattr(config, name, _HOOK_SETTINGS[name])
    _SEEN_BY_COMPILER.append(holder)
    torch.compiler.reset()


def compile_without(holder: object) -> None:
    """Undo `compile_with`. Does nothing for any other holder."""
    others = [other for other in _SEEN_BY_COMPILER if other is not holder]
    if len(others) == len(_SEEN_BY_COMPILER):
        return
    _SEEN_BY_COMPILER[:] = others
    if not _SEEN_BY_COMPILER:
        for name, value in _SETTINGS_BEFORE.items():
            setattr(sys.modules[_COMPILER].config, name, value)
        _SETTINGS_BEFORE.clear()
    torch.compiler.reset()
