"""Note how the training calls its model, to call it in the same way again."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ess_monitor import validation
from ess_monitor.capture.hooks.call_site import ModuleHook
from ess_monitor.errors import CaptureError


class _Autocast(NamedTuple):
    """The state of autocast on one kind of device."""

    device: str
    enabled: bool
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """A call of a model, with its arguments and the state of autocast.

    Tensors are those of the call, not copies, and without their graph. Lists, tuples and dicts are built anew for each
    run, so that a forward pass may take things out of them. Other objects are those of the call: what a forward pass
    has written into them, such as a cache of keys and values that it was given, is still there.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[_Autocast, ...] = ()
    cached: bool = True
    """Whether autocast kept its casts of weights."""
    _versions: tuple[tuple[torch.Tensor, int], ...] = field(default=(), repr=False)

    @property
    def changed(self) -> bool:
        """Whether a tensor has been written to since the call began, by the forward pass itself or by a loader.

        What is written through memory that the tensor shares with NumPy, or from another process, is not seen.
        """
        return any(tensor._version != version for tensor, version in self._versions)

    def run(self) -> Any:
        """Call the model in this way again, in whatever modes it is, and return its output.

        Run it inside `Undisturbed`: here, gradients and random numbers are as they are around it.

        Raises:
            CaptureError: the arguments have been written to.
        """
        if self.changed:
            raise CaptureError(
                "a tensor that the model was called with has been written to since, so the call cannot be repeated; "
                "let the forward pass write to a copy, and the loader to a new tensor for each batch"
            )
        with ExitStack() as stack:
            for device, enabled, dtype in self.autocast:
                if enabled or torch.is_autocast_enabled(device):
                    cached = self.cached and torch.is_autocast_cache_enabled()
                    region = torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cached)
                    stack.enter_context(region)
            return self.model(*_held(self.args, []), **_held(self.kwargs, []))


class CallRecorder:
    """Notes the last call that the training makes of a model: gradients on, the model in train mode, without an error.

    Noted are the outermost calls of this very module, also where it or a wrapper of it is compiled: nothing of this is
    compiled again. Not seen are calls inside a compiled function that is larger than the model, and those of a wrapper
    that was compiled around a class of torch itself, such as `nn.Sequential`. A function of this kind that is compiled
    while the recorder is attached is compiled once more after it.

    Args:
        model: as the training calls it, with its wrappers. A sharded model can be called through them only.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> recorder = CallRecorder(model)
        >>> recorder.attach()
        >>> output = model(torch.ones(3, 2))
        >>> recorder.detach()
        >>> call = recorder.take()
        >>> torch.equal(call.run(), output), recorder.recorded
        (True, None)
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = validation.instance("model", model, nn.Module)
        self._handles: list[RemovableHandle] = []
        self._devices: tuple[str, ...] = ()
        self._running: list[RecordedCall | None] = []
        self._recorded: RecordedCall | None = None

    @property
    def recorded(self) -> RecordedCall | None:
        """The last call since `attach`; None before it, and after `take`."""
        return self._recorded

    def attach(self) -> None:
        """Note calls from now on. A second call does nothing."""
        if self._handles:
            return
        # Compiled code around the model must neither trace the hooks nor what they call.
        with suppress(ImportError):  # private: without it a call from such code is not seen
            from torch._dynamo.eval_frame import skip_code

            skip_code(_Hook.__call__.__code__)
        tensors = (*self._model.parameters(), *self._model.buffers())
        self._devices = tuple(sorted({"cpu"} | {tensor.device.type for tensor in tensors} - {"meta"}))
        begin, keep, end = (
            _Hook(torch.compiler.disable(each))  # type: ignore[no-untyped-call]
            for each in (self._begin, self._keep, self._end)
        )
        # In front of all other hooks, which may change the arguments.
        self._handles = [
            self._model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True),
            self._model.register_forward_hook(keep),
            self._model.register_forward_hook(end, always_call=True),
        ]

    def detach(self) -> None:
        """Note no more calls. What was noted stays until `take`. A second call does nothing."""
        while self._handles:
            self._handles.pop().remove()
        self._running.clear()

    def take(self) -> RecordedCall | None:
        """Return `recorded` and keep no reference to it."""
        taken, self._recorded = self._recorded, None
        return taken

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (torch.is_grad_enabled() and module.training):
            self._running.append(None)
            return
        tensors: list[torch.Tensor] = []
        self._running.append(
            RecordedCall(
                self._model,
                _held(args, tensors),
                _held(kwargs, tensors),
                tuple(_Autocast(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in self._devices),
                torch.is_autocast_cache_enabled(),
                tuple((tensor, tensor._version) for tensor in tensors if not tensor.is_inference()),
            )
        )

    def _keep(self, *_: object) -> None:
        # An outer call ends after those inside it, and replaces what they have left.
        if self._running and self._running[-1] is not None:
            self._recorded = self._running[-1]

    def _end(self, *_: object) -> None:
        if self._running:
            self._running.pop()


class _Hook(ModuleHook):
    """Does nothing in a model that was replicated or traced, either."""

    def __call__(self, module: nn.Module, *call: Any) -> None:
        if torch.compiler.is_compiling() or getattr(module, "_is_replica", False):
            return
        if 1 + len(call) >= self._least:
            self._function(module, *call)


def _held(value: Any, tensors: list[torch.Tensor]) -> Any:
    """Return `value` with its tuples, lists and dicts built anew and its tensors without a graph, which it collects."""
    if isinstance(value, torch.Tensor):
        found = value.detach() if value.requires_grad else value
        tensors.append(found)
        return found
    kind = type(value)
    if kind in (dict, OrderedDict):
        return kind((key, _held(item, tensors)) for key, item in value.items())
    if kind in (list, tuple):
        return kind(_held(item, tensors) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*(_held(item, tensors) for item in value))
    return value
