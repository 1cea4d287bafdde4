"""One model of the census: what `describe` and `profile` say of it, against what its output depends on."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ess_monitor import CaptureConfig, LayerInfo, MonitorConfig, describe, profile
from ess_monitor.capture.detection import Mixing, MixingProbe, is_inside

Verdict = Literal[
    "fully",
    "partly",
    "skipped",
    "no mixer",
    "with inputs",
    "silent",
    "wrong",
    "crashed",
    "not run",
    "no package",
    "not built",
]
"""fully: every mixer is measured. partly: some are, the others have a reason. skipped: none is, all have a reason.
no mixer: nothing mixes tokens, and nothing is listed. with inputs: a module that mixes tokens is listed by
`describe(model, *inputs)` alone, and by the first sample of a run. silent: one is listed by neither. wrong: a module
is listed that treats every token by itself. crashed: `describe` or `profile` raised. not run: nothing is
listed, and there is no forward pass to tell. no package: it is built with a package that is not installed. not built:
the library's own code failed."""

CONFIG = MonitorConfig(positions=2, capture=CaptureConfig(samples=1, heads=2, max_length=64))


class Built(NamedTuple):
    """A model with the arguments of a forward pass; None where it cannot be run here."""

    model: nn.Module
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None


@dataclass(frozen=True)
class Item:
    """A model type or a layer class."""

    source: str
    """The library."""
    name: str
    build: Callable[[], Built]


@dataclass
class Outcome:
    """What was seen of one item."""

    source: str
    name: str
    verdict: Verdict = "not built"
    ran: bool = False
    """Whether a forward pass was made; without one the list alone is known."""
    measured: list[str] = field(default_factory=list)
    """Classes of layers that gave a reading."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Class -> why it gave none."""
    problem: str = ""
    seconds: float = 0.0
    """Processor time."""


def examine(item: Item) -> Outcome:
    """Build the model, describe it, run it, and compare."""
    outcome = Outcome(item.source, item.name)
    torch.manual_seed(0)
    try:
        model, inputs = item.build()
        model.eval()
    except ImportError as error:
        outcome.verdict, outcome.problem = "no package", _needed(error)
        return outcome
    except Exception as error:
        outcome.problem = _shown(error)
        return outcome
    try:
        layers = describe(model).layers
    except Exception as error:
        outcome.verdict, outcome.problem = "crashed", _shown(error)
        return outcome
    listed = {layer.name: layer for layer in layers}
    outcome.reasons = {layer.module: layer.reason for layer in layers if not layer.supported}
    outcome.measured = sorted({layer.module for layer in layers if layer.supported})
    found: dict[str, Mixing] = {}
    if inputs is not None:
        try:
            found = _probed(model, *inputs, listed)
            outcome.ran = True
        except Exception as error:
            outcome.problem = f"did not run: {_shown(error)}"
    silent = [name for name in found if found[name].mixes and not _is_told(name, listed)]
    wrong = [name for name in found if name in listed and _is_guess(listed[name]) and found[name].is_pointwise]
    if outcome.ran and outcome.measured and inputs is not None:
        try:
            readings = profile(model, *inputs[0], config=CONFIG, **inputs[1]).readings
        except Exception as error:
            outcome.verdict, outcome.problem = "crashed", _shown(error)
            return outcome
        for reading in readings:
            if reading.status != "ok":
                outcome.reasons[listed[reading.layer].module] = f"{reading.status}: {reading.message}"
        outcome.measured = sorted({listed[r.layer].module for r in readings if r.status == "ok"})
    modules = dict(model.named_modules())
    if silent:
        args, kwargs = inputs or ((), {})
        told = {layer.name for layer in describe(model, *args, **kwargs).layers}
        outcome.verdict = "with inputs" if all(_is_told(name, told) for name in silent) else "silent"
        outcome.problem = ", ".join(sorted({f"{type(modules[name]).__name__} ({name})" for name in silent})[:4])
    elif wrong:
        outcome.verdict = "wrong"
        outcome.problem = ", ".join(sorted({f"{type(modules[name]).__name__} ({name})" for name in wrong})[:4])
    elif not layers:
        outcome.verdict = "no mixer" if outcome.ran else "not run"
    else:
        outcome.verdict = "fully" if not outcome.reasons else "partly" if outcome.measured else "skipped"
    return outcome


def _probed(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], listed: Mapping[str, LayerInfo]
) -> dict[str, Mixing]:
    """Return what the modules depend on."""
    with MixingProbe(model, listed=listed) as probe:
        model(*args, **kwargs)
    return probe.found


def _is_told(name: str, listed: Collection[str]) -> bool:
    """Return whether a module that mixes is listed, holds one that is, or is a part of one."""
    return any(other == "model" or is_inside(name, other) or is_inside(other, name) for other in listed)


def _is_guess(layer: LayerInfo) -> bool:
    """Return whether a layer is listed because it seems to mix, and not for a reason of its kind (cross attention)."""
    return layer.supported or "register_capture" in layer.reason


def _needed(error: ImportError) -> str:
    found = re.search(r"requires the (\w+)|install (\w+) package|named '(\w+)", str(error))
    return f"needs {next(filter(None, found.groups()))}" if found else _shown(error)


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:200]
