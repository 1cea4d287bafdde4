"""Compiled code and hooks: what is attached after the first compiled call is not seen by it."""

from __future__ import annotations

import sys
import threading
import weakref
from typing import Any

import torch

_COMPILER = "torch._dynamo"
"""Imported by the first torch.compile, or optimizer, of a process."""

_HOLDERS: list[object] = []
_HELD: list[Any] = []
"""The stance before the first holder came, while there is one. Process-wide, as the stance itself is."""
_LOCK = threading.RLock()
"""Reentrant: a holder that is dropped is released by the garbage collector, which may run anywhere."""


class EagerStance:
    """Between `begin` and `end` compiled modules run as they were written, so that hooks and taps fire in them.

    Compiled code stays as it is and is used again afterwards, without another compilation. What was compiled rounds
    differently from what was written: a sampled step of a compiled model can differ in the last bits.

    Several may hold it and end in any order: the last one to end, or to be dropped without an end, brings the stance
    before the first one back. Set whether or not anything is compiled yet: a model that is compiled while a sample is
    armed is not traced with hooks.
    """

    def __init__(self) -> None:
        self._release: weakref.finalize[[object], EagerStance] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return EagerStance, ()

    def begin(self) -> None:
        """Let compiled code stand aside. A second call does nothing."""
        if self._release is not None and self._release.alive:
            return
        holder = object()
        with _LOCK:
            if not _HOLDERS:
                _HELD.append(torch.compiler.set_stance("force_eager"))
            _HOLDERS.append(holder)
        self._release = weakref.finalize(self, _let_go, holder)
        self._release.atexit = False

    def end(self) -> None:
        """Back to the stance before, when nobody else holds this one. A second call does nothing."""
        if self._release is not None:
            self._release()


def _let_go(holder: object) -> None:
    with _LOCK:
        _HOLDERS.remove(holder)
        if not _HOLDERS:
            _HELD.pop().__exit__(None, None, None)


_SEEING = {"skip_nnmodule_hook_guards": False, "trace_autograd_ops": True}
"""Settings of the compiler under which it notices hooks on some layers of many, and traces a gradient that is taken
inside of an autograd function (without it that is a graph break, and an error under fullgraph=True)."""

_SEEN_BY_COMPILER: list[object] = []
_BEFORE: dict[str, Any] = {}


def compile_with(holder: object) -> None:
    """Have everything that is compiled compiled again, now with the hooks and taps of `holder` in it.

    What `holder` attached must be attached by now. To be taken back with `compile_without`, after the hooks are gone.
    """
    if _COMPILER not in sys.modules:
        return
    config = sys.modules[_COMPILER].config
    if not _SEEN_BY_COMPILER:
        _BEFORE.update({name: getattr(config, name) for name in _SEEING if hasattr(config, name)})
        for name in _BEFORE:
            setattr(config, name, _SEEING[name])
    _SEEN_BY_COMPILER.append(holder)
    torch.compiler.reset()


def compile_without(holder: object) -> None:
    """Take `compile_with` back. Does nothing for a holder that was not there."""
    if not any(other is holder for other in _SEEN_BY_COMPILER):
        return
    _SEEN_BY_COMPILER[:] = [other for other in _SEEN_BY_COMPILER if other is not holder]
    if not _SEEN_BY_COMPILER:
        for name, value in _BEFORE.items():
            setattr(sys.modules[_COMPILER].config, name, value)
        _BEFORE.clear()
    torch.compiler.reset()
