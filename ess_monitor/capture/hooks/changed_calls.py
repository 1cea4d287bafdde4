"""Let the call at a site be made with other arguments, and count how often it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ess_monitor.capture.hooks.call_site import Arguments, Call, CallSite, HookHandle


@dataclass
class ChangedCalls:
    """Counts the calls of a layer that was to run with something else in it.

    A forward pass ran with it only if `calls` is above 0 and `unchanged` is 0. Compiled code shows no calls.
    """

    calls: int = 0
    """Calls that were made with other arguments."""
    unchanged: int = 0
    """Calls that could not be changed, such as steps of cached decoding."""


def change_arguments(
    site: CallSite,
    layer: nn.Module,
    change: Callable[[Call], Arguments | None],
    counts: ChangedCalls,
    *,
    count_only: bool = False,
) -> HookHandle:
    """Change the arguments of every call at the site, until the handle is removed.

    Args:
        site: the call.
        layer: the layer that makes it.
        change: returns the arguments of a call, or None for one that cannot be changed.
        counts: where calls are counted.
        count_only: leave the arguments as they are.
    """
    running: Call | None = None

    def before(call: Call) -> Arguments | None:
        nonlocal running
        if running is not None and call.forward_number and call.forward_number == running.forward_number:
            return None  # an op that the changed op calls: its arguments follow from the changed ones
        changed = change(call)
        if changed is None:
            counts.unchanged += 1
            return None
        counts.calls += 1
        running = call
        return None if count_only else changed

    def after(call: Call) -> None:
        nonlocal running
        began = (call.forward_number, call.start_number)
        if running is not None and began == (running.forward_number, running.start_number):
            running = None

    return site.watch(layer, before=before, after=after)
