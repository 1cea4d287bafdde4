"""Families of layers: one entry for an op, or for a class name, however many model files repeat it.

Libraries copy a layer from one model file to the next and keep the name of the op it calls. A family is therefore
found by the op's name in the layer's own code, so that a new model file needs no new entry here. Layers that call no op
of their own are found by class name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ess_monitor.capture.handles import AlphaHandle, DecayHandle
from ess_monitor.capture.hooks.call_site import CallSite, Op
from ess_monitor.capture.hooks.function_patch import StandIn, function_stand_in
from ess_monitor.capture.hooks.global_names import names_used
from ess_monitor.capture.spec import Build, CaptureSpec


def _nothing(module: nn.Module) -> None:
    return None


def _always(module: nn.Module) -> bool:
    return True


@dataclass(frozen=True)
class LayerAdapter:
    """Layers that are read the same way. All callables take the layer."""

    operator: str
    """Class name of the operator, for `describe`."""
    ops: Mapping[str, Build] = field(default_factory=dict)
    """Op name -> how its call is read. A layer belongs to the family when its code uses one of these names."""
    classes: str = ""
    """Or: a regular expression that `module.ClassName` matches in full."""
    build: Build | None = None
    """How a layer found by class name is read, at `path`."""
    path: str = ""
    """Sub-module whose call is read, for a layer found by class name."""
    state_capacity: Callable[[nn.Module], int | None] = _nothing
    capacity_grows: bool = False
    channels: Callable[[nn.Module], int | None] = _nothing
    decay: Callable[[nn.Module, CallSite], DecayHandle | None] = lambda module, site: None
    """The decay handle, given the site at which the layer is read."""
    alpha: Callable[[nn.Module], AlphaHandle | None] = _nothing
    uninformative: str = ""
    only: Callable[[nn.Module], bool] = _always
    """What must hold of a layer besides, where ops or classes are more common than the layers that are meant. Others
    are none of this family: they are neither read nor refused."""
    refuses: Callable[[nn.Module], str | None] = _nothing
    """Why this very layer cannot be read although its kind can (not causal, an unknown variant); None where it can."""
    make: StandIn = function_stand_in
    """What is put under an op's name."""
    namespaces: tuple[Callable[[], dict[str, Any] | None], ...] = ()
    """Further namespaces in which the names may be looked up (`vars(torch.nn.functional)`)."""

    def site(self, layer: nn.Module) -> CallSite | None:
        """Where this layer is read; None when it is not of the family."""
        site = self._site(layer)
        return site if site is not None and self.only(layer) else None

    def _site(self, layer: nn.Module) -> CallSite | None:
        if self.classes:
            cls = type(layer)
            matches = any(re.fullmatch(self.classes, f"{c.__module__}.{c.__qualname__}") for c in cls.__mro__)
            return CallSite(self.path) if matches else None
        used = names_used(type(layer))
        further = [found for find in self.namespaces if (found := find()) is not None]
        ops = []
        for name in self.ops:
            if name in used:
                looked_up = [*used[name], *further]
                namespaces = tuple(space for space in looked_up if name in space)
                if namespaces:
                    ops.append(Op(name, namespaces, self.make))
        return CallSite(ops=tuple(ops)) if ops else None

    def spec(self, layer: nn.Module) -> CaptureSpec | None:
        """How this very layer is read; None when it is not of the family."""
        site = self.site(layer)
        if site is None or self.refuses(layer) is not None:
            return None
        return CaptureSpec(
            operator=self.operator,
            build=self.build or (lambda call: self.ops[call.op](call)),
            site=site,
            state_capacity=self.state_capacity,
            capacity_grows=self.capacity_grows,
            channels=lambda module: self.channels(module) or 0,
            decay=self.decay(layer, site),
            alpha=self.alpha(layer),
            uninformative=self.uninformative,
        )


FAMILIES: list[LayerAdapter] = []
"""Filled by the modules of `ess_monitor.capture.adapters`. The first that knows a layer reads it."""
