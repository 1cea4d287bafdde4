"""Find the sequence mixers of a model, and say why the others are skipped."""

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

_TESTED_VERSIONS: dict[str, tuple[str, str]] = {
    "transformers": ("transformers", "5.23.0"),
    "fla": ("flash-linear-attention", "0.6.0"),
    "mamba_ssm": ("mamba_ssm", "2.3.2.post1"),
}
"""Import name -> (distribution, version that the tests run with)."""

_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")
_MIXER_NAMES = re.compile(
    r"attention|attn|mamba|ssm|s4|s5|s6|deltanet|retention|rwkv|recurren|lru|hyena|longconv|timemix|mixer",
    re.IGNORECASE,
)
_PARTS_OF_A_LAYER = re.compile(r"norm|embedding|mlp|feedforward|expert|router|rotary|head$", re.IGNORECASE)
"""Modules that carry the name of the architecture they belong to."""


class LayerFilter(BaseModel):
    """Chooses the layers to measure, by shell patterns on their dotted module names. A list is read as `include`."""

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
        """Return whether the layer called `name` is to be measured."""
        validation.instance("name", name, str, hint="the dotted name of a module")
        return any(fnmatchcase(name, p) for p in self.include) and not any(fnmatchcase(name, p) for p in self.exclude)


@dataclass(frozen=True)
class Layer:
    """A layer that can be read, with its place in the model."""

    name: str
    module: nn.Module
    spec: CaptureSpec


def check_model(model: nn.Module, name: str = "model") -> nn.Module:
    """Return `model`, or raise `ConfigError` where it is not a module."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name}: {validation.type_of(model)} is not a torch.nn.Module; pass the trained {name}")
    return model


def _filter(layers: LayerFilter | None) -> LayerFilter:
    hint = 'LayerFilter(include=("blocks.*",)), or None for every layer'
    return validation.optional("layers", layers, LayerFilter, hint=hint) or LayerFilter()


def _clean_name(name: str) -> str:
    """Return a module's name without the prefixes that DDP, FSDP, torch.compile and checkpoint wrappers add."""
    return _WRAPPERS.sub("", name).lstrip(".") or "model"


def _looks_like_mixer(module: nn.Module) -> bool:
    if isinstance(module, nn.RNNBase) or why_refused(module) is not None:
        return True
    name = type(module).__name__
    mixes = _MIXER_NAMES.search(name) and not _PARTS_OF_A_LAYER.search(name)
    return bool(mixes) and any(True for _ in module.parameters())


def _library_of(module: nn.Module) -> str | None:
    """Return the import name of the known library that a module's class comes from."""
    name = type(module).__module__.partition(".")[0]
    return name if name in _TESTED_VERSIONS else None


def _versions_of(library: str) -> str:
    """Return a text with the installed and the tested version.

    >>> _versions_of("fla").endswith("tested with 0.6.0")
    True
    """
    distribution, tested = _TESTED_VERSIONS[library]
    try:
        installed = version(distribution)
    except PackageNotFoundError:
        installed = "of an unknown version"
    return f"{distribution} {installed}, tested with {tested}"


def _why_skipped(module: nn.Module) -> str:
    if isinstance(module, nn.RNNBase):
        return "a nonlinear recurrence has no linear operator y = T u, so ESS is not defined for it"
    refused = why_refused(module)
    if refused is not None:
        return refused
    cls, library = type(module).__name__, _library_of(module)
    problem = f"no capture is known for {cls}"
    if library is not None:
        problem = f"{cls} calls no op of a known name ({_versions_of(library)})"
    return f"{problem}; teach it with @ess_monitor.register_capture({cls})"


def _is_below(name: str, prefixes: list[str]) -> bool:
    return any(prefix == "" or name.startswith(prefix + ".") for prefix in prefixes)


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, CaptureSpec | None]]:
    """Yield every outermost module that can be read, and every innermost lookalike of a mixer, in model order.

    A readable module inside a module whose own code calls an op is a layer too: the op is not what it does. A
    convolution inside a mixer is a part of it, not a layer.
    """
    modules = dict(model.named_modules())
    lookalikes = {name for name, module in modules.items() if _looks_like_mixer(module)}
    specs = {name: spec for name, module in modules.items() if (spec := find_spec(module)) is not None}
    mixers = lookalikes | specs.keys()
    convolutions = {name for name, module in modules.items() if isinstance(module, nn.Conv1d)}
    parts = {name for name in convolutions if name and name.rpartition(".")[0] in mixers}
    mixers -= parts
    closed: list[str] = []  # nothing inside these is a layer
    open_: list[str] = []  # what can be read inside these is one
    for name, module in modules.items():
        if name not in mixers or _is_below(name, closed):
            continue
        is_inside = _is_below(name, open_)
        if name in specs and not (is_inside and name in convolutions):
            (open_ if specs[name].site.ops else closed).append(name)
            yield name, module, specs[name]
        elif name in lookalikes and not is_inside and not any(_is_below(other, [name]) for other in mixers - {name}):
            yield name, module, None


def find_layers(model: nn.Module, layers: LayerFilter | None = None) -> tuple[Layer, ...]:
    """Return the layers to measure, in model order.

    Raises:
        ConfigError: an include or exclude pattern matches no layer of the model. Otherwise a typing error could mean
            that nothing, or too much, is measured without notice.
    """
    model, layers = check_model(model), _filter(layers)
    found = [Layer(_clean_name(name), module, spec) for name, module, spec in _walk(model) if spec is not None]
    names = [layer.name for layer in found]
    for pattern in (*layers.include, *layers.exclude):
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"layers: pattern {pattern!r} matches none of the measurable layers {names}; "
                "see ess_monitor.describe(model) for the names"
            )
    return tuple(layer for layer in found if layers.matches(layer.name))


def layer_infos(model: nn.Module, layers: LayerFilter | None = None) -> tuple[LayerInfo, ...]:
    """Return what `describe` says about every sequence mixer of the model, measured or skipped, in model order."""
    model, layers = check_model(model), _filter(layers)
    infos = []
    for raw_name, module, spec in _walk(model):
        name, cls = _clean_name(raw_name), type(module).__name__
        if spec is None:
            infos.append(LayerInfo(name=name, module=cls, supported=False, reason=_why_skipped(module)))
            continue
        is_chosen = layers.matches(name)
        infos.append(
            LayerInfo(
                name=name,
                module=cls,
                supported=is_chosen,
                reason="" if is_chosen else "excluded by the `layers` setting",
                operator=spec.operator,
                state_capacity=spec.state_capacity(module),
                capacity_grows=spec.capacity_grows,
                uninformative=spec.uninformative,
                channels=spec.channels(module) or 0,
                handles=spec.handles,
            )
        )
    return tuple(infos)


def skipped_of_libraries(model: nn.Module) -> tuple[tuple[str, ...], bool]:
    """Return why mixers of known libraries are skipped, and whether the model has no other mixers.

    There is one reason per class: a new version may have renamed its op. The second value is False where a mixer is
    refused for a reason of its own, which no version of its library would change.
    """
    reasons: dict[type[nn.Module], str] = {}
    has_others = False
    for name, module, spec in _walk(check_model(model)):
        is_skipped = spec is None and _library_of(module) is not None
        if is_skipped:
            reasons[type(module)] = f"{_clean_name(name)}: {_why_skipped(module)}"
        has_others |= not is_skipped or why_refused(module) is not None
    return tuple(reasons.values()), bool(reasons) and not has_others
