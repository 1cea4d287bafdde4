"""Which layer classes can be read, and how a new one is added.

The table is filled by `register_capture` and by the adapters of libraries that are *already imported*: an adapter is
imported only when its library is in `sys.modules`, so the monitor never pulls in a framework by itself.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from ess_monitor import validation
from ess_monitor.capture.layer_adapter import FAMILIES
from ess_monitor.capture.spec import CaptureSpec
from ess_monitor.errors import CaptureError
from ess_monitor.ess import Operator

Read = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], Operator]
"""`(module, args, kwargs, output) -> Operator` of one forward call of your layer."""

_SPECS: dict[type[nn.Module], CaptureSpec] = {}

_ADAPTERS = {
    "ess_monitor.featurizers": "ess_monitor.capture.adapters.featurizers",
    "torch": "ess_monitor.capture.adapters",
}
"""Library (a name in `sys.modules`) -> module of ours that registers its layers when imported. The adapters of other
people's layers know them by the names in their code, and import no library."""


def add_spec(layer: type[nn.Module], spec: CaptureSpec) -> None:
    """Register `spec` for `layer` and its sub-classes, replacing an earlier one."""
    _check_layer(layer)
    _SPECS[layer] = spec


def _check_layer(layer: type[nn.Module]) -> None:
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise CaptureError(
            f"layer: {validation.shown(layer)} is not a torch.nn.Module class; pass the class, not an instance"
        )


def register_capture(
    layer: type[nn.Module],
    *,
    operator: str = "custom",
    state_capacity: Callable[[nn.Module], int | None] | None = None,
    channels: Callable[[nn.Module], int] | None = None,
) -> Callable[[Read], Read]:
    """Teach the monitor to read a layer of your own.

    The decorated function gets `(module, args, kwargs, output)` of one forward call, with gradients off, and returns
    the operator the layer applied (any class of `ess_monitor.ess`). Return views of the tensors you have: the monitor
    narrows the operator to a few samples and heads before it copies anything.

    Args:
        layer: the module class; sub-classes are read the same way.
        operator: what `describe` calls it, usually the class name of the operator you return.
        state_capacity: TSS per channel from the module, for `describe`; the reading itself takes it from the operator.
        channels: number of independent operators from the module, for `describe`.

    Raises:
        CaptureError: `layer` is no module class, or something that should be a function is none.

    Example:
        >>> import torch
        >>> from ess_monitor import capture_operators, register_capture
        >>> from ess_monitor.ess import DiagonalRecurrence
        >>> class Ema(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.log_decay = torch.nn.Parameter(torch.tensor(-0.1))
        ...     def forward(self, x):
        ...         y, s = [], torch.zeros_like(x[:, 0])
        ...         for t in range(x.shape[1]):
        ...             s = self.log_decay.exp() * s + x[:, t]
        ...             y.append(s)
        ...         return torch.stack(y, 1)
        >>> @register_capture(Ema, operator="DiagonalRecurrence", state_capacity=lambda ema: 1)
        ... def read_ema(ema, args, kwargs, output):
        ...     ones = torch.ones(len(output), 1, output.shape[1], 1)
        ...     return DiagonalRecurrence(ema.log_decay.reshape(1, 1, 1, 1), ones, ones)
        >>> model = torch.nn.Sequential(Ema())
        >>> capture_operators(model, torch.randn(2, 8, 4))["0"].length
        8
    """

    _check_layer(layer)
    validation.instance("operator", operator, str, hint="the name of an operator's class", error=CaptureError)
    for name, given in (("state_capacity", state_capacity), ("channels", channels)):
        if given is not None:
            validation.function(name, given, hint="of the module, or None", error=CaptureError)

    def decorate(build: Read) -> Read:
        validation.function("build", build, hint="(module, args, kwargs, output) -> Operator", error=CaptureError)
        extra: dict[str, Any] = {}
        if state_capacity is not None:
            extra["state_capacity"] = state_capacity
        if channels is not None:
            extra["channels"] = channels
        add_spec(
            layer,
            CaptureSpec(
                operator=operator,
                build=lambda call: build(call.module, call.args, call.kwargs, call.output),
                **extra,
            ),
        )
        return build

    return decorate


def find_spec(module: nn.Module) -> CaptureSpec | None:
    """The spec for this module's class or its nearest registered base class, or None."""
    for library, adapter in _ADAPTERS.items():
        if library in sys.modules:
            importlib.import_module(adapter)
    for cls in type(module).__mro__:
        if cls in _SPECS:
            return _SPECS[cls]
    specs = (family.spec(module) for family in FAMILIES)
    return next((spec for spec in specs if spec is not None), None)


def why_refused(module: nn.Module) -> str | None:
    """Why a layer whose kind is known cannot be read; None when its kind is not known, or it can be read."""
    for family in FAMILIES:
        if family.site(module) is not None:
            return family.refuses(module)
    return None
