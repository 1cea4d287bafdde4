"""Run a layer with A^power in place of A, to see what its decay does to the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ess_monitor import validation
from ess_monitor.capture.handles import AlphaHandle
from ess_monitor.capture.hooks.call_site import Arguments, Call, HookHandle, ModuleHook
from ess_monitor.capture.hooks.changed_calls import ChangedCalls, change_arguments
from ess_monitor.capture.layers import Layer
from ess_monitor.errors import CaptureError


def can_raise(layer: Layer) -> str:
    """Return why `decay_raised` cannot change the layer's A; empty where it can.

    Examples:
        >>> from ess_monitor.capture import find_layers
        >>> from ess_monitor.featurizers import GLA, LA
        >>> [can_raise(layer) for layer in find_layers(nn.Sequential(GLA(16, 2), LA(16, 2)))]
        ['', 'LA has no decay, or a fixed one']
    """
    decay, kind = layer.spec.decay, type(layer.module).__name__
    if (decay is not None and decay.raised is not None) or layer.spec.alpha is not None:
        return ""
    if decay is None:
        return f"{kind} has no decay, or a fixed one"
    return f"A of {kind} follows from {', '.join(decay.parameters)}, and nothing in it is a decay that has a power"


@contextmanager
def decay_raised(layer: Layer, power: float) -> Iterator[ChangedCalls]:
    """Let the layer compute with A^power in place of A inside the block: log A times `power`.

    The arguments of the layer's op are changed (`DecayHandle.raised`). Where the layer computes A from its parameters,
    alpha is changed at the beginning of each forward call of the layer and restored bit for bit at its end, also after
    an exception (`AlphaHandle.raised`). Both leave what enters the state as it is, except in RG-LRU.

    Forward passes in the block need no gradients: run them under `torch.no_grad()`, and not in compiled code.

    Args:
        layer: a layer for which `can_raise` returns "".
        power: 0.5 remembers more; `math.inf` is A = 0: a token sees itself alone, or the one before it where the state
            is read before the update (RWKV-4, RWKV-6). With 1 everything stays as it is, and calls are counted.

    Yields:
        Counts of the calls in the block: a layer that was not called, or could not be changed, is to be noticed there.

    Raises:
        CaptureError: the layer cannot be raised.
        ConfigError: the power is not a number above 0.

    Examples:
        >>> from ess_monitor.capture import find_layers
        >>> from ess_monitor.featurizers import GLA
        >>> model, x = GLA(16, 2), torch.randn(1, 8, 16)
        >>> [layer] = find_layers(model)
        >>> with torch.no_grad(), decay_raised(layer, math.inf) as raised:
        ...     last = model(x)[:, -1]
        ...     alone = model(x[:, -1:])[:, -1]
        >>> torch.allclose(last, alone, atol=1e-5), raised.calls
        (True, 2)
    """
    validation.instance("layer", layer, Layer, hint="find_layers(model)[i]")
    if not (isinstance(power, (int, float)) and math.isinf(power) and power > 0):
        power = validation.real("power", power, above=0, hint="0.5 remembers more; math.inf is A = 0")
    reason = can_raise(layer)
    if reason:
        raise CaptureError(f"layer {layer.name}: {reason}; find_layers(model)[i].spec has its handles")
    counts, decay, alpha = ChangedCalls(), layer.spec.decay, layer.spec.alpha
    if decay is not None and (raised := decay.raised) is not None:

        def change(call: Call) -> Arguments | None:
            return raised(call, power)

        watch = change_arguments(decay.site, layer.module, change, counts, count_only=power == 1)
    else:
        assert alpha is not None
        watch = _raise_alpha(layer.module, alpha, power, counts)
    try:
        yield counts
    finally:
        watch.remove()


def _raise_alpha(layer: nn.Module, alpha: AlphaHandle, power: float, counts: ChangedCalls) -> HookHandle:
    """Change alpha at the beginning of each forward call, and restore it at its end.

    FSDP has the whole parameter in place only during the call, and a shared parameter serves others outside of it.
    """
    handle, change, restore_after = HookHandle(), HookHandle(), HookHandle()

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        counts.calls += 1
        if power == 1:
            return
        change.remove()
        restore_after.remove()
        change.add(_change(module, alpha, power))
        # Added last, it is called last: hooks that read the layer's call find A^power. It removes no hook, itself
        # included: after an exception, hooks are called while the dictionary that holds them is iterated over.
        end = ModuleHook(lambda module, args, output: change.remove())
        restore_after.add(module.register_forward_hook(end, always_call=True).remove)

    handle.add(change.remove)
    handle.add(restore_after.remove)
    handle.add(layer.register_forward_pre_hook(ModuleHook(begin)).remove)
    return handle


@torch.no_grad()
def _change(module: nn.Module, alpha: AlphaHandle, power: float) -> Callable[[], None]:
    """Change alpha, each rank its own part of it, and return what restores it."""
    tensor = alpha.of(module)
    if alpha.is_number:
        alpha.put(module, alpha.raised(tensor, power))
        return lambda: alpha.put(module, tensor)
    # By `data` autograd sees no change: the graph of an earlier forward pass can still be used after the restoration.
    memory = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).data
    before = memory.clone()
    memory.copy_(alpha.raised(memory, power))

    def restore() -> None:
        if memory.untyped_storage().nbytes() > 0:  # otherwise FSDP has freed what it had gathered for this call
            memory.copy_(before)

    return restore
