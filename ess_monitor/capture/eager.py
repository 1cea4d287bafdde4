"""Compiled code and hooks: what is attached after the first compiled call is not seen by it."""

from __future__ import annotations

import sys
from typing import Any

import torch

_COMPILER = "torch._dynamo"
"""Imported by the first torch.compile of a process, and slow to import: without it nothing is compiled."""


class EagerStance:
    """Between `begin` and `end` compiled modules run as they were written, so that hooks and taps fire in them.

    Compiled code stays as it is and is used again afterwards, without another compilation. What was compiled rounds
    differently from what was written: a sampled step of a compiled model can differ in the last bits.
    """

    def __init__(self) -> None:
        self._stance: Any = None

    def begin(self) -> None:
        """Let compiled code stand aside, if there can be any. A second call does nothing."""
        if self._stance is None and _COMPILER in sys.modules and hasattr(torch.compiler, "set_stance"):
            self._stance = torch.compiler.set_stance("force_eager")

    def end(self) -> None:
        """Back to the stance before. A second call does nothing."""
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None


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
