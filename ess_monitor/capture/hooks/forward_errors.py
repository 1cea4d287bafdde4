"""Being told that a model's forward pass raised, so that nothing stays attached to a model whose training is over."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

_OF_CHECKPOINTS = "_StopRecomputationError"
"""Ends the recomputation of a checkpointed model, once all that it saved is there again. No failure."""


def when_raised(model: nn.Module, act: Callable[[], None]) -> Callable[[], None]:
    """Have `act` called whenever a forward call of `model` ends with an exception, which then goes on to the caller.

    `act` may remove any hooks, those of `model` too. It is not called for what is no `Exception` (KeyboardInterrupt),
    for calls of a part of the model, nor in compiled code.

    Returns:
        A function that takes it back; a second call of it does nothing.

    Example:
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
    guard = next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _Guard)), None)
    if guard is None:
        guard = _Guard()
        # In front of all others: an exception of theirs is one of the forward pass too.
        guard.handle = model.register_forward_pre_hook(guard, prepend=True)
    guard.acts.append(act)
    return lambda: guard.forget(act)


class _Guard:
    """One for each model, a hook in front of its forward that puts another one behind it.

    PyTorch calls the hooks behind a forward that raised while it iterates over the very dictionary they are in, so
    that none may be removed there, unless the iteration is at its end. So the hook behind is made anew for each call:
    it is then the last one, and the others can be removed from within it.
    """

    def __init__(self) -> None:
        self.acts: list[Callable[[], None]] = []
        self.handle: RemovableHandle | None = None
        self._behind: RemovableHandle | None = None
        self._before: BaseException | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Guard, ()  # a copy of the model is not the model that is watched

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.acts or getattr(module, "_is_replica", False) or torch.compiler.is_compiling():
            return
        self._clear()
        self._before = sys.exc_info()[1]
        self._behind = module.register_forward_hook(_Behind(self), always_call=True)

    def ended(self, module: nn.Module) -> None:
        """The forward call came to an end of either kind."""
        error, before = sys.exc_info()[1], self._before
        raised = error is not None and error is not before
        if raised and not self._last(module._forward_hooks):
            return  # somebody added a hook during the forward pass: nothing can be removed now
        self._clear()
        if raised and type(error).__name__ != _OF_CHECKPOINTS:
            for act in tuple(self.acts):
                act()

    def forget(self, act: Callable[[], None]) -> None:
        """Not to be told any more."""
        self.acts = [other for other in self.acts if other is not act]
        if not self.acts and self.handle is not None:
            self.handle.remove()
            self.handle = None
            self._clear()

    def _last(self, hooks: object) -> bool:
        """Whether an iteration over the hooks, under way at ours, bears that some are removed."""
        return isinstance(hooks, OrderedDict) and self._behind is not None and next(reversed(hooks)) == self._behind.id

    def _clear(self) -> None:
        behind, self._behind, self._before = self._behind, None, None
        if behind is not None:
            behind.remove()


class _Behind:
    """The hook behind the forward; does nothing in a copy of the model."""

    def __init__(self, guard: _Guard | None) -> None:
        self._guard = guard

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._guard is not None:
            self._guard.ended(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Behind, (None,)
