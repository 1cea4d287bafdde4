"""Find out how a layer is read, and register how a class of your own is.

Layers of other libraries are known by the names in their code, and no library is imported for them. The package's own
featurizers are added once `ess_monitor.featurizers` is imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ess_monitor import validation
from ess_monitor.capture.adapters import LAYER_ADAPTERS
from ess_monitor.capture.hooks.call_site import Call
from ess_monitor.capture.spec import CaptureSpec, unknown
from ess_monitor.errors import CaptureError, format_error
from ess_monitor.ess import Operator

Read = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], Operator]
"""`(module, args, kwargs, output) -> Operator` of one forward call of your layer."""

Mixed = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], tuple[Tensor, Tensor]]
"""`(module, args, kwargs, output) -> (u, y)` of one forward call of your layer."""

_SPECS: dict[type[nn.Module], CaptureSpec] = {}


def add_spec(layer: type[nn.Module], spec: CaptureSpec) -> None:
    """Register `spec` for `layer` and its sub-classes, replacing an earlier one."""
    _SPECS[layer] = spec


def register_capture(
    layer: type[nn.Module],
    *,
    operator: str = "custom",
    state_capacity: Callable[[nn.Module], int | None] | None = None,
    channels: Callable[[nn.Module], int] | None = None,
    mixed: Mixed | None = None,
) -> Callable[[Read], Read]:
    """Teach the monitor to read a layer of your own.

    The decorated function gets `(module, args, kwargs, output)` of one forward call, with gradients off, and returns
    the operator the layer applied (any class of `ess_monitor.ess`). Return views of the tensors you have: the monitor
    narrows the operator to a few samples and heads before it copies anything.

    Args:
        layer: the module class; sub-classes are read the same way.
        operator: what `describe` calls it, usually the class name of the operator you return.
        state_capacity: TSS per channel from the module. A reading takes it from the operator, apart from convolutions
            and dense operators, which do not know the state that made them.
        channels: number of independent operators from the module, for `describe`.
        mixed: `(module, args, kwargs, output) -> (u, y)` with y = T u, both (batch, heads, length, channels), for
            `check_capture`. Needed where the layer has a gate, a norm or a nonlinearity behind the mixing. The first
            sample of a run is compared as well, and what does not fit is logged once.

    Raises:
        CaptureError: `layer` is not a module class, or an argument that should be a function is not one.

    Examples:
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
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise CaptureError(
            f"layer: {validation.shown(layer)} is not a torch.nn.Module class; pass the class, not an instance"
        )
    validation.instance("operator", operator, str, hint="the name of an operator's class", error=CaptureError)
    for name, given in (("state_capacity", state_capacity), ("channels", channels), ("mixed", mixed)):
        if given is not None:
            validation.function(name, given, hint="of the module, or None", error=CaptureError)

    def decorate(build: Read) -> Read:
        validation.function("build", build, hint="(module, args, kwargs, output) -> Operator", error=CaptureError)
        spec = CaptureSpec(
            operator=operator,
            build=lambda call: _built(build, call, state_capacity or unknown),
            state_capacity=state_capacity or unknown,
            channels=channels or unknown,
            mixed=None if mixed is None else lambda call: mixed(call.module, call.args, call.kwargs, call.output),
            is_taught=True,
        )
        add_spec(layer, spec)
        return build

    return decorate


def _built(build: Read, call: Call, state_capacity: Callable[[nn.Module], int | None]) -> Operator:
    """Return the operator of a call, with the TSS that was registered where it has none of its own."""
    operator = build(call.module, call.args, call.kwargs, call.output)
    if not isinstance(operator, Operator):
        raise CaptureError(
            f"the function for {type(call.module).__name__} returned {validation.type_of(operator)}; return an "
            "operator of ess_monitor.ess, such as DenseOperator(T) for a matrix"
        )
    capacity = state_capacity(call.module)
    if capacity is not None and getattr(operator, "state_size", 0) is None:
        return replace(operator, state_size=capacity)  # type: ignore[call-arg]
    return operator


def find_spec(module: nn.Module) -> CaptureSpec | str | None:
    """Return how a layer is read, or why it cannot be; None where nothing is known of its kind.

    That of the module's class comes first, then that of its nearest registered base class, then that of the first
    adapter. It never raises: a reader that fails on a layer is a reason.
    """
    reason: str | None = None
    try:
        known = _SPECS
        if "ess_monitor.featurizers" in sys.modules:
            known = importlib.import_module("ess_monitor.capture.adapters.featurizers").SPECS | _SPECS
        for cls in type(module).__mro__:
            if cls in known:
                return known[cls]
    except Exception as error:
        return why_unreadable(module, error)
    for adapter in LAYER_ADAPTERS:
        try:
            if adapter.site(module) is None:
                continue
            refused = adapter.refusal(module)
            spec = None if refused else adapter.spec(module)
        except Exception as error:
            spec, refused = None, why_unreadable(module, error)
        if spec is not None:
            return spec
        reason = reason or refused
    return reason


def why_unreadable(module: nn.Module, error: Exception) -> str:
    """Return the reason for a layer whose reader raised `error`."""
    cls = type(module).__name__
    return (
        f"the reader of its kind failed on {cls}: {format_error(error)}; leave it out with `layers`, or teach it with "
        f"@ess_monitor.register_capture({cls})"
    )
