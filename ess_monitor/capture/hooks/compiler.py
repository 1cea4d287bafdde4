"""Make hooks work on compiled models: compiled code ignores what is attached after its first call."""

from __future__ import annotations

import sys
import threading
import weakref
from typing import Any

import torch

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


def _release_holder(holder: object) -> None:
    with _LOCK:
        _HOLDERS.remove(holder)
        if not _HOLDERS:
            _STANCE_BEFORE.pop().__exit__(None, None, None)


_HOOK_SETTINGS = {"skip_nnmodule_hook_guards": False, "trace_autograd_ops": True}
"""Settings with which the compiler notices hooks on some of many layers, and traces a gradient that is taken inside an
autograd function (otherwise that is a graph break, and an error under fullgraph=True)."""

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
