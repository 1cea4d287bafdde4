"""Finding the sequence mixers of a model, and saying of the others why they are skipped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from torch import nn

from ess_monitor import validation
from ess_monitor.capture.registry import find_spec, why_refused
from ess_monitor.capture.spec import CaptureSpec
from ess_monitor.errors import ConfigError
from ess_monitor.records import LayerInfo

_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")
_MIXER_NAMES = re.compile(
    r"attention|attn|mamba|ssm|s4|s5|s6|deltanet|retention|rwkv|recurren|lru|hyena|longconv|timemix|mixer",
    re.IGNORECASE,
)

_PARTS_OF_A_LAYER = re.compile(r"norm|embedding|mlp|feedforward|expert|router|rotary|head$", re.IGNORECASE)
"""Modules that carry the name of the architecture they belong to."""


class LayerFilter(BaseModel):
    """Which layers are measured, by shell patterns on their dotted module names. A list is read as `include`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    include: tuple[str, ...] = ("*",)
    """A layer is measured when its name matches one of these. The default takes every layer that can be read."""
    exclude: tuple[str, ...] = ()
    """...and none of these, for example layers whose cost is not worth it."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"include": (value,)}
        if isinstance(value, (list, tuple)):
            return {"include": tuple(value)}
        return value

    def matches(self, name: str) -> bool:
        """True when the layer called `name` is to be measured."""
        validation.instance("name", name, str, hint="the dotted name of a module")
        return any(fnmatchcase(name, p) for p in self.include) and not any(fnmatchcase(name, p) for p in self.exclude)


@dataclass(frozen=True)
class Layer:
    """A layer that can be read: where it is in the model and how it is read."""

    name: str
    module: nn.Module
    spec: CaptureSpec


def check_model(model: nn.Module, name: str = "model") -> nn.Module:
    """`model`, or `ConfigError` where it is none."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name}: {validation.type_of(model)} is not a torch.nn.Module; pass the trained {name}")
    return model


def _filter(layers: LayerFilter | None) -> LayerFilter:
    hint = 'LayerFilter(include=("blocks.*",)), or None for every layer'
    return validation.optional("layers", layers, LayerFilter, hint=hint) or LayerFilter()


def clean_name(name: str) -> str:
    """Dotted module name without the prefixes that DDP, FSDP, torch.compile and checkpoint wrappers add."""
    cleaned = _WRAPPERS.sub("", name).lstrip(".")
    return cleaned or "model"


def _looks_like_mixer(module: nn.Module) -> bool:
    if isinstance(module, nn.RNNBase) or why_refused(module) is not None:
        return True
    name = type(module).__name__
    mixes = _MIXER_NAMES.search(name) and not _PARTS_OF_A_LAYER.search(name)
    return bool(mixes) and any(True for _ in module.parameters())


def _why_skipped(module: nn.Module) -> str:
    if isinstance(module, nn.RNNBase):
        return "a nonlinear recurrence has no linear operator y = T u, so ESS is not defined for it"
    refused = why_refused(module)
    if refused is not None:
        return refused
    library = library_of(module)
    if library is not None:
        return (
            f"{type(module).__name__} calls no op of a known name ({versions_of(library)}); "
            f"teach it with @ess_monitor.register_capture({type(module).__name__})"
        )
    return (
        f"no capture is known for {type(module).__name__}; "
        f"teach it with @ess_monitor.register_capture({type(module).__name__})"
    )


def _owner(name: str) -> str | None:
    """Name of the module that holds `name`; None for the model itself."""
    return name.rpartition(".")[0] if name else None


def _is_below(name: str, prefixes: list[str]) -> bool:
    return any(name.startswith(prefix + ".") or prefix == "" for prefix in prefixes)


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, CaptureSpec | None]]:
    """Every outermost module that can be read, and every innermost one that only looks like a mixer, in model order.

    What can be read inside of a module whose own code calls an op is one of its own: the op is not what it does. A
    convolution is a part of the mixer that holds it, not one beside it.
    """
    inside: list[str] = []
    around: list[str] = []
    modules = list(model.named_modules())
    lookalikes = {name for name, module in modules if _looks_like_mixer(module)}
    specs = {name: spec for name, module in modules if (spec := find_spec(module)) is not None}
    parts = {
        name for name, module in modules if isinstance(module, nn.Conv1d) and _owner(name) in lookalikes | specs.keys()
    }
    modules = [(name, module) for name, module in modules if name not in parts]
    lookalikes -= parts
    readable = specs.keys() - parts
    for name, module in modules:
        if _is_below(name, inside):
            continue
        part = _is_below(name, around)
        if name in readable and not (part and isinstance(module, nn.Conv1d)):
            (around if specs[name].site.ops else inside).append(name)
            yield name, module, specs[name]
        elif name in lookalikes and not part:
            below = name + "." if name else ""
            nested = (other for other in lookalikes | readable if other != name and other.startswith(below))
            if not any(nested):
                yield name, module, None


def find_layers(model: nn.Module, layers: LayerFilter | None = None) -> tuple[Layer, ...]:
    """The layers to measure, in model order.

    Raises:
        ConfigError: an include or exclude pattern matches no layer of the model (a typing error would otherwise mean
            that nothing, or too much, is watched in silence).
    """
    model, layers = check_model(model), _filter(layers)
    found = [Layer(clean_name(name), module, spec) for name, module, spec in _walk(model) if spec is not None]
    names = [layer.name for layer in found]
    for pattern in (*layers.include, *layers.exclude):
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"layers: pattern {pattern!r} matches none of the measurable layers {names}; "
                "see ess_monitor.describe(model) for the names"
            )
    return tuple(layer for layer in found if layers.matches(layer.name))


def layer_infos(model: nn.Module, layers: LayerFilter | None = None) -> tuple[LayerInfo, ...]:
    """What `describe` says of every sequence mixer of the model, measured or skipped, in model order."""
    model, layers = check_model(model), _filter(layers)
    infos = []
    for raw_name, module, spec in _walk(model):
        name, cls = clean_name(raw_name), type(module).__name__
        if spec is None:
            infos.append(LayerInfo(name=name, module=cls, supported=False, reason=_why_skipped(module)))
            continue
        excluded = not layers.matches(name)
        infos.append(
            LayerInfo(
                name=name,
                module=cls,
                supported=not excluded,
                reason="excluded by the `layers` setting" if excluded else "",
                operator=spec.operator,
                state_capacity=spec.state_capacity(module),
                capacity_grows=spec.capacity_grows,
                uninformative=spec.uninformative,
                channels=spec.channels(module),
                handles=spec.handles,
            )
        )
    return tuple(infos)


def skipped_of_libraries(model: nn.Module) -> tuple[str, ...]:
    """Why mixers of libraries that are known are skipped, once a class: a new version may have moved a name."""
    skipped = ((name, module) for name, module, spec in _walk(model) if spec is None and library_of(module) is not None)
    return tuple({type(module): f"{clean_name(name)}: {_why_skipped(module)}" for name, module in skipped}.values())


def all_moved(model: nn.Module) -> bool:
    """Whether the model has mixers, all of libraries that are known, and none calls an op of a name that is known.

    What is refused for a reason of its own is not meant: no version of its library could be read.
    """
    mixers = [(module, spec) for _, module, spec in _walk(model)]
    return bool(mixers) and all(
        spec is None and library_of(module) is not None and why_refused(module) is None for module, spec in mixers
    )


TESTED: dict[str, tuple[str, str]] = {
    "transformers": ("transformers", "5.23.0"),
    "fla": ("flash-linear-attention", "0.6.0"),
    "mamba_ssm": ("mamba_ssm", "2.3.2.post1"),
}
"""Import name -> (distribution, version that the tests run with)."""


def library_of(module: nn.Module) -> str | None:
    """Import name of the known library that a module's class comes from."""
    name = type(module).__module__.partition(".")[0]
    return name if name in TESTED else None


def versions_of(library: str) -> str:
    """What is installed, and what was tested, in words.

    >>> versions_of("fla").endswith("tested with 0.6.0")
    True
    """
    distribution, tested = TESTED[library]
    try:
        installed = version(distribution)
    except PackageNotFoundError:
        installed = "of an unknown version"
    return f"{distribution} {installed}, tested with {tested}"
