"""Find the sequence mixers of a model, and say why the others are skipped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from ess_monitor import validation
from ess_monitor.capture.detection import (
    A_LOOP,
    MixingProbe,
    how_code_mixes,
    is_holder,
    looks_like_mixer,
    treats_tokens_alone,
)
from ess_monitor.capture.hooks.forward_errors import when_raised
from ess_monitor.capture.linearized import LINEARIZED
from ess_monitor.capture.registry import find_spec, why_unreadable
from ess_monitor.capture.spec import BY_JACOBIAN, CaptureSpec, unread
from ess_monitor.errors import ConfigError
from ess_monitor.records import LayerInfo
from ess_monitor.validation.settings import Settings

Unknown = Literal["skip", "jacobian"]
"""What becomes of layers that no reader knows; see `CaptureConfig.unknown`."""

_TESTED_VERSIONS: dict[str, tuple[str, str]] = {
    "transformers": ("transformers", "4.57 to 5.24"),
    "fla": ("flash-linear-attention", "0.6.0"),
    "mamba_ssm": ("mamba_ssm", "2.3.2.post1"),
}
"""Import name -> (distribution, version that the tests run with)."""

_WRAPPERS = re.compile(
    r"(^|\.)(module|_orig_mod|_forward_module|_original_module|_fsdp_wrapped_module|_fpw_module"
    r"|_checkpoint_wrapped_module)(?=\.|$)"
)
_MODEL = re.compile(r"(^|\.)(model|base_model)(?=\.|$)")
"""What modules around a model call it. Other modules have such names too, so they stay in the names of layers."""


class LayerFilter(Settings):
    """Chooses the layers to measure, by shell patterns on their dotted module names. A list is read as `include`."""

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
        if not isinstance(value, (Mapping, LayerFilter)):
            allowed = "a pattern, a list of patterns, or include and exclude"
            raise ValueError(f"must be {allowed} (got {validation.shown(value)})")
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
    """Return a module's name without what DDP, FSDP, Fabric, torch.compile and checkpoint wrappers add."""
    return _WRAPPERS.sub("", name).lstrip(".") or "model"


def bare_name(name: str) -> str:
    """Return a layer's name as it is whatever the model is wrapped in: without wrappers, and what they call the model.

    >>> bare_name("base_model.model.blocks.0._orig_mod.mixer"), bare_name("model")
    ('blocks.0.mixer', '')
    """
    return _MODEL.sub("", _WRAPPERS.sub("", name)).lstrip(".")


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


def _why_unknown(module: nn.Module) -> str:
    """Return why a module that mixes tokens cannot be read, where no reader knows its kind; empty for other modules."""
    if isinstance(module, nn.RNNCellBase):
        return _CELL
    cls, library = type(module).__name__, _library_of(module)
    how = "" if treats_tokens_alone(type(module)) else how_code_mixes(module)
    if not how and not looks_like_mixer(type(module)):
        return ""
    if how == A_LOOP and any(isinstance(child, nn.RNNCellBase) for child in module.children()):
        return _NONLINEAR
    told = f"its code has {how}" if how else "it is called like a sequence mixer"
    problem = f"no capture is known for {cls}"
    if library is not None:
        problem = f"{cls} calls no op of a known name ({_versions_of(library)})"
    return unread(module, f"{problem}, and {told}")


_FILTERS = (nn.Conv1d, nn.ConvTranspose1d, nn.ConstantPad1d, nn.ConstantPad2d)
"""What is a part of a mixer where it is inside of one."""


def _of_torch(module: nn.Module) -> str:
    """Return why a module of torch that mixes tokens cannot be read; empty for other modules."""
    if isinstance(module, nn.RNNBase):
        return _BOTH_WAYS if module.bidirectional else _NONLINEAR
    if isinstance(module, nn.ConvTranspose1d) and module.kernel_size[0] > 1:
        return "a transposed convolution: its outputs are more than its inputs, so T is not square"
    if isinstance(module, (nn.ConstantPad1d, nn.ConstantPad2d)) and min(module.padding) < 0 < max(module.padding):
        return "a shift of the sequence: an output holds one earlier input, whatever the model has learned"
    return ""


_NONLINEAR = f"a nonlinear recurrence has no linear operator y = T u, so ESS is not defined for it; {BY_JACOBIAN}"
_BOTH_WAYS = "a bidirectional recurrence: its outputs depend on later tokens, so that no state carries the past on"
_CELL = (
    "a cell of a nonlinear recurrence, which is called for one token at a time; put the loop over tokens into the "
    "forward of a module, of which capture.unknown: jacobian then measures the linearization"
)


def _is_below(name: str, prefixes: list[str]) -> bool:
    return any(prefix == "" or name.startswith(prefix + ".") for prefix in prefixes)


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, CaptureSpec | str]]:
    """Yield every module that mixes tokens, with how it is read or why it cannot be, in model order.

    Of modules inside of one another it is the outermost, unless that is a block, a stack or a model around them. A
    module that can be read, inside of one whose own code mixes tokens as well, is a layer too. A convolution inside of
    a mixer is a part of it.
    """
    modules = dict(model.named_modules())
    known = {name: found for name, module in modules.items() if (found := find_spec(module) or _of_torch(module))}
    mixers = known | {
        name: why for name, module in modules.items() if name not in known and (why := _why_unknown(module))
    }
    filters = {name for name in mixers if isinstance(modules[name], _FILTERS)}
    closed: list[str] = []  # nothing inside these is a layer
    open_: list[str] = []  # what is known inside these is one, convolutions apart
    for name, module in modules.items():
        if name not in mixers or _is_below(name, closed):
            continue
        found, is_inside = mixers[name], _is_below(name, open_)
        if is_inside and (name in filters or name not in known):
            continue
        if isinstance(found, CaptureSpec):
            (open_ if found.site.ops else closed).append(name)
            yield name, module, found
            continue
        inside = [other for other in mixers if other != name and _is_below(other, [name])]
        if name not in known and _is_around(module, {other: modules[other] for other in inside}, known):
            continue
        (open_ if known.keys() & set(inside) - filters else closed).append(name)
        yield name, module, found


def _is_around(module: nn.Module, mixers: dict[str, nn.Module], known: dict[str, CaptureSpec | str]) -> bool:
    """Return whether a module of an unknown kind is only around the `mixers` inside of it.

    It is one where its code does no mixing of its own and a known layer is inside, and where it is a block, a stack or
    a model. A mixer with convolutions inside is no block: they are parts of it.
    """
    if not mixers:
        return False
    around = is_holder(module, mixers.values())
    others = [name for name, mixer in mixers.items() if not isinstance(mixer, _FILTERS)]
    if how_code_mixes(module):
        return around and bool(others)
    return around or any(name in known for name in others)


def _found(model: nn.Module, unknown: Unknown) -> Iterator[tuple[str, nn.Module, CaptureSpec | str]]:
    """Yield `_walk`, with a way to read layers of an unknown kind where `unknown` asks for one."""
    for name, module, found in _walk(model):
        linearized = unknown == "jacobian" and isinstance(found, str) and found.endswith(BY_JACOBIAN)
        yield name, module, LINEARIZED if linearized else found


def find_layers(model: nn.Module, layers: LayerFilter | None = None, *, unknown: Unknown = "skip") -> tuple[Layer, ...]:
    """Return the layers to measure, in model order; with `unknown="jacobian"` also those of an unknown kind.

    Raises:
        ConfigError: an include or exclude pattern matches no layer of the model. Otherwise a typing error could mean
            that nothing, or too much, is measured without notice.
    """
    model, layers = check_model(model), _filter(layers)
    found = [
        Layer(_clean_name(name), module, spec)
        for name, module, spec in _found(model, unknown)
        if isinstance(spec, CaptureSpec)
    ]
    names = [layer.name for layer in found]
    for pattern in (*layers.include, *layers.exclude):
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"layers: pattern {pattern!r} matches none of the measurable layers {names}; "
                "see ess_monitor.describe(model) for the names"
            )
    return tuple(layer for layer in found if layers.matches(layer.name))


def layer_infos(
    model: nn.Module, layers: LayerFilter | None = None, *, unknown: Unknown = "skip"
) -> tuple[LayerInfo, ...]:
    """Return what `describe` says about every sequence mixer of the model, measured or skipped, in model order."""
    model, layers = check_model(model), _filter(layers)
    return tuple(_info(_clean_name(name), module, found, layers) for name, module, found in _found(model, unknown))


def probed_infos(
    model: nn.Module, inputs: tuple[Any, ...], named_inputs: dict[str, Any], layers: LayerFilter | None = None
) -> tuple[LayerInfo, ...]:
    """Return `layer_infos`, corrected by what the outputs of the modules depend on in one forward pass.

    A module that mixes tokens is added. One of an unknown kind whose output depends on its own token alone is left out,
    and one whose output depends on later tokens cannot be measured.
    """
    model, layers = check_model(model), _filter(layers)
    listed = {name: (module, found) for name, module, found in _walk(model)}
    with evaluating(model), torch.enable_grad(), MixingProbe(model, listed=listed) as probe:
        model(*inputs, **named_inputs)
    modules = dict(model.named_modules())
    for name in probe.unlisted():
        listed[name] = modules[name], _why_unlisted(modules[name])
    for name, mixing in probe.found.items():
        if name not in listed:
            continue
        module, found = listed[name]
        if mixing.is_pointwise and isinstance(found, str) and find_spec(module) is None:
            del listed[name]
        elif bool(mixing.future) and (isinstance(found, CaptureSpec) or find_spec(module) is None):
            listed[name] = module, _LOOKS_AHEAD
    chosen = (name for name in modules if name in listed)
    return tuple(_info(_clean_name(name), *listed[name], layers) for name in chosen)


class FirstSampleProbe:
    """Asks in the first sampled forward pass of a run which modules mix tokens and are not listed.

    Args:
        model: the watched model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._modules = model, dict(model.named_modules())
        self._probe = MixingProbe(model, listed=[name for name, _, _ in _walk(model)], in_training=True)
        self._forget: Callable[[], None] = lambda: None

    def attach(self) -> None:
        """Add the hooks, for one forward pass; one that raises removes them."""
        self.remove()
        self._probe.attach()
        self._forget = when_raised(self._model, self.remove)

    def remove(self) -> None:
        """Remove the hooks."""
        self._forget()
        self._probe.remove()

    def flags(self) -> tuple[Tensor, ...]:
        """Return the answers, on the devices of the modules."""
        return tuple(self._probe.flags())

    def unlisted(self, flags: Iterable[Tensor]) -> tuple[str, ...]:
        """Return name and reason of each, from copies of `flags` on the host."""
        self._probe.take_from_host(flags)
        found = self._probe.unlisted()
        return tuple(f"{_clean_name(name)}: {_why_unlisted(self._modules[name])}" for name in found)


def _why_unlisted(module: nn.Module) -> str:
    cls = type(module).__name__
    return (
        f"no capture is known for {cls}, and its output depends on other tokens; teach it with "
        f"@ess_monitor.register_capture({cls})"
    )


_LOOKS_AHEAD = (
    "its output depends on later tokens on these inputs: T is not lower triangular, so there is no state that carries "
    "the past and ESS is not defined"
)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode, without gradients, so that no dropout draws random numbers. Restore each module's mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _info(name: str, module: nn.Module, found: CaptureSpec | str, layers: LayerFilter) -> LayerInfo:
    cls = type(module).__name__
    if isinstance(found, str):
        return LayerInfo(name=name, module=cls, supported=False, reason=found)
    is_chosen = layers.matches(name)
    try:
        return LayerInfo(
            name=name,
            module=cls,
            supported=is_chosen,
            reason="" if is_chosen else "excluded by the `layers` setting",
            operator=found.operator,
            state_capacity=found.state_capacity(module),
            capacity_grows=found.capacity_grows,
            uninformative=found.uninformative,
            channels=found.channels(module) or 0,
            handles=found.handles,
        )
    except Exception as error:
        return LayerInfo(name=name, module=cls, supported=False, reason=why_unreadable(module, error))


def skipped_of_libraries(model: nn.Module) -> tuple[tuple[str, ...], bool]:
    """Return why mixers of known libraries are skipped, and whether the model has no other mixers.

    There is one reason per class: a new version may have renamed its op. The second value is False where a mixer is
    refused for a reason of its own, which no version of its library would change.
    """
    reasons: dict[type[nn.Module], str] = {}
    has_others = False
    for name, module, found in _walk(check_model(model)):
        is_skipped = isinstance(found, str) and _library_of(module) is not None
        if is_skipped:
            reasons[type(module)] = f"{_clean_name(name)}: {found}"
        has_others |= not is_skipped or isinstance(find_spec(module), str)
    return tuple(reasons.values()), bool(reasons) and not has_others
