"""Runs one small, randomly initialized layer of a library, and compares T u with the layer's output.

The reference is the library: u and y are the input and output of its own call, recorded by hooks and wrappers of this
file. T is the operator that `ess_monitor.capture` built for the same call, materialized in float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ess_monitor.capture import CaptureConfig, Captured, Sampler, find_layers, layer_infos
from ess_monitor.capture.hooks.call_site import Call
from ess_monitor.ess import tolerance_ess


def _as_it_is(product: Tensor) -> Tensor:
    return product


class Mixed(NamedTuple):
    """Input and output of one call of the library: y should equal finish(T u)."""

    u: Tensor
    """(batch, heads, length, channels): the input of every head's operator."""
    y: Tensor
    """Output of the library."""
    finish: Callable[[Tensor], Tensor] = _as_it_is
    """The rest of the library's call after T u (a skip connection, a gate), in float64."""


class NotReadError(RuntimeError):
    """A reading failed; the text is its reason."""


@dataclass(frozen=True)
class Case:
    """A layer in a model."""

    library: str
    layer: str
    """Class of the layer."""
    build: Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]
    """Builds the model and the arguments of its forward pass. Called after torch.manual_seed."""
    mixed: Callable[[Call], Mixed]
    """Gets u and y from the call at which the layer is captured."""
    tolerance: float = 1e-5
    """Limit of max|T u - y| / max|y|."""
    note: str = ""
    modes: tuple[str, ...] = ("train", "eval")
    pulled: bool = True
    """Whether the layer has a decay that the regularizer can pull."""
    scaled: bool = True
    """Whether it has an alpha."""

    @property
    def package(self) -> str:
        """Package that must be installed."""
        return {"flash-linear-attention": "fla"}.get(self.library, self.library)

    @property
    def name(self) -> str:
        """Name of the case in tables and test ids."""
        return f"{self.library} {self.layer}" + (f" ({self.note})" if self.note else "")


@dataclass
class Row:
    """Measurements of one case."""

    library: str
    layer: str
    error: float
    """Largest error over the layers of this class."""
    state_capacity: float | None
    effective_size: float
    handles: tuple[str, ...]
    note: str = ""
    layers: int = 0
    described: dict[str, Any] = field(default_factory=dict)
    """Facts that `describe` gives of the first layer."""
    measured: dict[str, Any] = field(default_factory=dict)
    """The same facts of the captured operator."""


def measure(case: Case, mode: str) -> Row:
    """Run the model once, and compare T u with its output."""
    with torch.random.fork_rng(devices=()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library warns about its own options
        torch.manual_seed(0)
        model, args, kwargs = case.build()
        model.train(mode == "train")
    layers = tuple(layer for layer in find_layers(model) if type(layer.module).__name__ == case.layer)
    if not layers:
        raise LookupError(f"{case.name}: the model has no layer of this class; {layer_infos(model)}")
    seen: dict[str, Mixed] = {}
    everything = CaptureConfig(samples=2**31, heads=None, max_length=None, source="validation")
    sampler = Sampler(layers, everything)
    sampler.arm()
    watches = [layer.spec.site.watch(layer.module, after=_keep(seen, layer.name, case)) for layer in layers]
    try:
        with torch.set_grad_enabled(mode == "train"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(*args, **kwargs)
    finally:
        for watch in watches:
            watch.remove()
        taken = sampler.collect()
    errors, sizes = [], []
    for item in taken:
        if not isinstance(item, Captured):
            raise NotReadError(str(item.error))
        mixed = seen[item.layer.name]
        y = mixed.y.detach().double()
        product = mixed.finish(
            item.operator.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor).materialize()
            @ mixed.u.detach().double()
        )
        assert product.shape == y.shape, f"{case.name}: T u is {tuple(product.shape)}, y {tuple(y.shape)}"
        errors.append(((product - y).abs().max() / y.abs().max()).item())
        middle = [item.operator.length // 2]
        sizes.append(tolerance_ess(item.operator.singular_values(middle)).float().mean().item())
    if len(taken) != len(layers):
        raise RuntimeError(f"{case.name}: {len(layers) - len(taken)} of {len(layers)} layers were not captured")
    operator, info = taken[0].operator, next(i for i in layer_infos(model) if i.name == taken[0].layer.name)
    capacity = None if operator.capacity_grows else operator.state_capacity([operator.length // 2]).item()
    measured = {
        "operator": type(operator).__name__,
        "state_capacity": capacity,
        "capacity_grows": operator.capacity_grows,
        "channels": operator.heads,
    }
    return Row(
        library=case.library,
        layer=case.layer,
        error=max(errors),
        state_capacity=capacity,
        effective_size=sum(sizes) / len(sizes),
        handles=info.handles,
        note=case.note,
        layers=len(layers),
        described={name: getattr(info, name) for name in measured},
        measured=measured,
    )


def _keep(seen: dict[str, Mixed], name: str, case: Case) -> Callable[[Call], None]:
    def keep(call: Call) -> None:
        if name not in seen and call.output is not None:
            seen[name] = case.mixed(call)

    return keep
