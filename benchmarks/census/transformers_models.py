"""Every model type of transformers, small: its own default configuration with fewer layers and narrower ones."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from itertools import product
from typing import Any

import torch

from benchmarks.census.item import Built, Item
from benchmarks.census.model_inputs import inputs_on_which
from benchmarks.census.small_config import SHRINKS, shrunk

_MOST_PARAMETERS = 1e8
_MOST_SECONDS = 15.0
"""Processor time after which no other model of a type that does not run is tried."""
_SERIES = {"prediction_length": 8}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_ROPE_IN_SECTIONS = {**_ROPE, "mrope_section": [16, 16, 16, 16]}
_ROPE_BY_KIND = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_WITHOUT_DEFAULT: dict[str, dict[str, Any]] = {
    "autoformer": _SERIES,
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "cohere_compass": {"text_config": {"rope_parameters": _ROPE_BY_KIND}},
    "cohere_compass_text": {"rope_parameters": _ROPE_BY_KIND},
    "chameleon": {"vocabulary_map": {"<image>": 4, **{f"IMGIMGB{letter}Z": 5 + n for n, letter in enumerate("BCDE")}}},
    "emu3": {"vocabulary_map": {"<image>": 4, "<|visual token 000000|>": 5, "<|extra_200|>": 6}},
    "hunyuan_vl": {"text_config": {"rope_parameters": _ROPE_IN_SECTIONS}},
    "hunyuan_vl_text": {"rope_parameters": _ROPE_IN_SECTIONS},
    "reformer": {"is_decoder": True, "axial_pos_shape": (4, 6)},
}
"""Settings that a model needs and its configuration has no default for."""
_KERNELS = ("fla", "causal_conv1d", "mamba_ssm", "natten")
"""Packages whose kernels need a device; models have code of their own where they are not installed."""


def items() -> Iterator[Item]:
    """Yield every model type that has a model."""
    import_module("transformers.models.llama.modeling_llama")  # once, for all processes of the run
    for name in sorted(_classes()):
        yield Item("transformers", name, partial(build, name))


def build(name: str) -> Built:
    """Build a small model with inputs on which it runs, or a wider one, or none but the modules.

    The last is on the device without memory, and has no inputs.
    """
    with _without(_KERNELS):
        begin = time.process_time()
        for by, cls in product(SHRINKS, _classes()[name]):
            try:
                config = shrunk(_config(name), by)
                left = begin + _MOST_SECONDS - time.process_time()
                if left < 0 or _parameters(cls, config) > _MOST_PARAMETERS:
                    continue
                model = _model(cls, config).eval()
                return Built(model, ((), inputs_on_which(model, config, seconds=left)))
            except ImportError:
                raise
            except Exception:
                continue
        for by, cls in product(SHRINKS, _classes()[name]):
            try:
                return Built(_without_memory(cls, shrunk(_config(name), by)), None)
            except Exception as error:
                problem = error
    raise problem


@contextmanager
def _without(packages: Sequence[str]) -> Iterator[None]:
    """Make packages unknown to what is imported meanwhile."""
    known = {name: sys.modules.get(name) for name in packages}
    sys.modules.update(dict.fromkeys(packages))
    try:
        yield
    finally:
        for name, module in known.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def _parameters(cls: str, config: Any) -> int:
    return sum(parameter.numel() for parameter in _without_memory(cls, config).parameters())


def _without_memory(cls: str, config: Any) -> Any:
    with torch.device("meta"):
        return _model(cls, config)


def _model(cls: str, config: Any) -> Any:
    import transformers

    return getattr(transformers, cls)._from_config(config, experts_implementation="eager")


def _config(name: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(name, **_WITHOUT_DEFAULT.get(name, {}))


@cache
def _classes() -> dict[str, list[str]]:
    """Return the classes of each model type: with the head that trains it where there is one, or any."""
    from transformers.models.auto import modeling_auto

    others = [name for name in vars(modeling_auto) if name.endswith("_MAPPING_NAMES")]
    first = ["MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_MAPPING_NAMES"]
    found: dict[str, list[str]] = {}
    for mapping in dict.fromkeys((*first, *others)):
        for name, classes in getattr(modeling_auto, mapping).items():
            if mapping != "CONFIG_MAPPING_NAMES":
                found.setdefault(name, []).extend([classes] if isinstance(classes, str) else classes)
    return {name: list(dict.fromkeys(classes))[:3] for name, classes in found.items()}
