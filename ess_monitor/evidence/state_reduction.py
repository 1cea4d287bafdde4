"""Run a layer with a smaller state, to see what the last of its state dimensions are worth to the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ess_monitor import validation
from ess_monitor.capture.hooks.call_site import Arguments, Call
from ess_monitor.capture.hooks.changed_calls import ChangedCalls, change_arguments
from ess_monitor.capture.layers import Layer
from ess_monitor.errors import CaptureError


def can_reduce(layer: Layer) -> str:
    """Return why `state_reduced` cannot make the layer's state smaller; empty where it can.

    Examples:
        >>> from torch import nn
        >>> from ess_monitor.capture import find_layers
        >>> from ess_monitor.featurizers import GLA, SA
        >>> [can_reduce(layer) for layer in find_layers(nn.Sequential(GLA(16, 2), SA(16, 2)))]
        ['', 'no argument of a call in SA holds its state dimensions']
    """
    if layer.spec.state is not None:
        return ""
    return f"no argument of a call in {type(layer.module).__name__} holds its state dimensions"


@contextmanager
def state_reduced(layer: Layer, share: float) -> Iterator[ChangedCalls]:
    """Let the layer compute inside the block without some of its state dimensions, the least used ones of each head.

    Nothing is written to these dimensions (`StateHandle.reduced`), so that rank(H_i) is at most the number of the
    others. How much a dimension is used is the root mean square of what writes to it times that of what reads it, over
    the sequences and tokens of the call.

    Forward passes in the block need no gradients: run them under `torch.no_grad()`, and not in compiled code.

    Args:
        layer: a layer for which `can_reduce` returns "".
        share: of the state dimensions that are left out, above 0 and up to 1; at least one of each head is. With 1 the
            state stays empty, and T = 0.

    Yields:
        Counts of the calls in the block: a layer that was not called, or could not be changed, is to be noticed there.

    Raises:
        CaptureError: the layer's state cannot be made smaller.
        ConfigError: the share is not a number above 0 and up to 1.

    Examples:
        >>> import torch
        >>> from ess_monitor.capture import capture_operators, find_layers
        >>> from ess_monitor.ess import tolerance_ess
        >>> from ess_monitor.featurizers import GLA
        >>> model, x = GLA(16, 2), torch.randn(1, 32, 16)
        >>> [layer] = find_layers(model)
        >>> with torch.no_grad(), state_reduced(layer, 0.25) as reduced:
        ...     [operator] = capture_operators(model, x).values()
        >>> tolerance_ess(operator.singular_values([16])).max().item(), reduced.calls
        (6.0, 1)
    """
    validation.instance("layer", layer, Layer, hint="find_layers(model)[i]")
    share = validation.real("share", share, above=0, high=1, hint="0.25 leaves out a quarter of the state dimensions")
    handle = layer.spec.state
    if handle is None:
        raise CaptureError(f"layer {layer.name}: {can_reduce(layer)}; its state cannot be made smaller")
    counts, reduced = ChangedCalls(), handle.reduced

    def change(call: Call) -> Arguments | None:
        return reduced(call, share)

    watch = change_arguments(handle.site, layer.module, change, counts)
    try:
        yield counts
    finally:
        watch.remove()
