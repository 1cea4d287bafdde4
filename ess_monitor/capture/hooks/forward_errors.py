"""Report that a model's forward pass raised, so that nothing stays attached to a model whose training is over."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ess_monitor.capture.hooks.call_site import ModuleHook

_END_OF_RECOMPUTATION = "_StopRecomputationError"
"""Ends the recomputation of a checkpointed model once all saved tensors are there again. Not a failure."""


def when_raised(model: nn.Module, act: Callable[[], None]) -> Callable[[], None]:
    """Call `act` whenever a forward call of `model` raises an `Exception`, which then goes on to the caller.

    `act` may remove any hooks, those of `model` too. It is not called for a `KeyboardInterrupt`, for calls of a part of
    the model, nor in compiled code.

    Returns:
        A function that undoes this; a second call of it does nothing.

    Examples:
        >>> model = nn.Linear(2, 2)
        >>> forget = when_raised(model, lambda: print("gone wrong"))
        >>> try:
        ...     _ = model(torch.ones(3))
        ... except RuntimeError:
        ...     forget()
        gone wrong
        >>> len(model._forward_pre_hooks), len(model._forward_hooks)
        (0, 0)
    """
    watch = next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _ForwardErrorHook)), None)
    if watch is None:
        watch = _ForwardErrorHook()
        # In front of all other hooks: an exception in one of them counts as well.
        watch.handle = model.register_forward_pre_hook(watch, prepend=True)
    watch.acts.append(act)
    return lambda: watch.forget(act)


class _ForwardErrorHook(ModuleHook):
    """Runs before a model's forward and adds a hook that runs after it. There is one per model.

    After a forward that raised, PyTorch calls the hooks while it iterates over the dictionary that holds them. Only the
    last one can remove any. The hook after the forward is therefore added again for each call, which makes it the last.
    """

    def __init__(self) -> None:
        super().__init__(self._begin)
        self.acts: list[Callable[[], None]] = []
        self.handle: RemovableHandle | None = None
        self._end_hook: RemovableHandle | None = None
        self._error_before: BaseException | None = None

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.acts or getattr(module, "_is_replica", False) or torch.compiler.is_compiling():
            return
        self._clear()
        self._error_before = sys.exc_info()[1]  # one that the caller is handling
        self._end_hook = module.register_forward_hook(ModuleHook(self._end), always_call=True)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        error = sys.exc_info()[1]
        raised = error is not None and error is not self._error_before
        if raised and not self._is_last(module._forward_hooks):
            return  # a hook was added during the forward pass: nothing can be removed now
        self._clear()
        if raised and type(error).__name__ != _END_OF_RECOMPUTATION:
            for act in tuple(self.acts):
                act()

    def forget(self, act: Callable[[], None]) -> None:
        """Stop calling `act`."""
        self.acts = [other for other in self.acts if other is not act]
        if not self.acts and self.handle is not None:
            self.handle.remove()
            self.handle = None
            self._clear()

    def _is_last(self, hooks: object) -> bool:
        end_hook = self._end_hook
        return isinstance(hooks, OrderedDict) and end_hook is not None and next(reversed(hooks)) == end_hook.id

    def _clear(self) -> None:
        end_hook, self._end_hook, self._error_before = self._end_hook, None, None
        if end_hook is not None:
            end_hook.remove()
