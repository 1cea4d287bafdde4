"""Read a whole family of layers, however many model files repeat it.

Libraries copy a layer from one model file to the next and keep the name of the op it calls. An adapter therefore finds
its layers by the op's name in their own code, so that a new model file needs no new adapter. Layers that call no op are
found by class name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ess_monitor.capture.handles import AlphaHandle, DecayHandle, StateHandle, StateWeights
from ess_monitor.capture.hooks.call_site import CallSite, Op
from ess_monitor.capture.hooks.function_patch import AttributeStandIn, StandIn, function_stand_in
from ess_monitor.capture.hooks.global_names import names_used
from ess_monitor.capture.spec import Build, CaptureSpec, unknown


@dataclass(frozen=True)
class LayerAdapter:
    """Says how all layers of a family are read. All callables take the layer."""

    operator: str
    """Class name of the operator, for `describe`."""
    ops: Mapping[str, Build] = field(default_factory=dict)
    """Op name -> how its call is read. The family has every layer whose code uses one of these names."""
    classes: str = ""
    """Instead of ops: a regular expression that matches `module.ClassName` in full."""
    build: Build | None = None
    """With `classes`: how the call at `path` is read."""
    path: str = ""
    """With `classes`: the sub-module whose call is read."""
    state_capacity: Callable[[Any], int | None] = unknown
    capacity_grows: bool = False
    channels: Callable[[Any], int | None] = unknown
    decay: Callable[[Any, CallSite], DecayHandle | None] = lambda layer, site: None
    """The decay handle, given the site at which the layer is read."""
    alpha: Callable[[Any], AlphaHandle | None] = unknown
    state: Callable[[Any, CallSite], StateHandle | None] = lambda layer, site: None
    """The handle on the state's dimensions, given the same site."""
    weights: Callable[[Any], StateWeights | str | None] = unknown
    """The weights that the state size sets."""
    uninformative: Callable[[Any], str] = lambda layer: ""
    is_member: Callable[[Any], bool] = lambda layer: True
    """Narrows the family where its ops or classes are more common than its layers. Other layers are ignored."""
    refusal: Callable[[Any], str | None] = unknown
    """Why a layer of the family cannot be read (not causal, an unknown variant); None where it can."""
    stand_in: StandIn = function_stand_in
    """Builds what is put under an op's name."""
    namespaces: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    """Further namespaces in which the ops are looked up (`vars(torch.nn.functional)`)."""

    def site(self, layer: nn.Module) -> CallSite | None:
        """Return where this layer is read; None when it is not of the family."""
        if self.classes:
            names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(layer).__mro__)
            site = CallSite(self.path) if any(re.fullmatch(self.classes, name) for name in names) else None
        else:
            used = names_used(type(layer))
            # A layer that has chosen its ops and keeps them as attributes calls those, whatever the global names hold.
            kept = tuple(name for name in self.ops if name in used and inspect.isfunction(vars(layer).get(name)))
            looked_up = {name: (*used[name], *self.namespaces) for name in self.ops if name in used}
            holding = {name: tuple(s for s in spaces if name in s) for name, spaces in looked_up.items()}
            ops = tuple(Op(name, spaces, self.stand_in) for name, spaces in holding.items() if spaces)
            ops = tuple(Op(name, (vars(layer),), AttributeStandIn) for name in kept) or ops
            site = CallSite(ops=ops) if ops else None
        return site if site is not None and self.is_member(layer) else None

    def spec(self, layer: nn.Module) -> CaptureSpec | None:
        """Return how this layer is read; None when it is not of the family, or refused."""
        site = self.site(layer)
        if site is None or self.refusal(layer) is not None:
            return None
        return CaptureSpec(
            operator=self.operator,
            build=self.build or (lambda call: self.ops[call.op](call)),
            site=site,
            state_capacity=self.state_capacity,
            capacity_grows=self.capacity_grows,
            channels=self.channels,
            decay=self.decay(layer, site),
            alpha=self.alpha(layer),
            state=self.state(layer, site),
            weights=self.weights,
            uninformative=self.uninformative(layer),
        )
