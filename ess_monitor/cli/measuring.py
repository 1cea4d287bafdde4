"""Runs models of the command line on random input, and measures new featurizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ess_monitor.capture import CaptureConfig, LayerFilter
from ess_monitor.cli.model_loading import load_model, make_inputs
from ess_monitor.cli.options import InputKind, Unknown, layer_filter
from ess_monitor.cli.weights import load_into
from ess_monitor.config import MonitorConfig
from ess_monitor.errors import CaptureError, EssMonitorError
from ess_monitor.featurizers import build_mixer
from ess_monitor.inspection import profile

T = TypeVar("T")

FEATURIZER_ROWS: dict[str, tuple[str, dict[str, float]]] = {
    "LA": ("la", {}),
    "WLA": ("wla", {}),
    "GLA": ("gla", {}),
    "SA": ("sa", {}),
    "S6": ("s6", {}),
    "GLA-S6 alpha=1": ("gla_s6", {"alpha": 1.0}),
    "GLA-S6 alpha=1000": ("gla_s6", {"alpha": 1000.0}),
}
"""Label -> featurizer and options: the six featurizers, GLA-S6 before and after the paper's remedy (section 4.1)."""


def config_of(
    batch: int,
    length: int,
    patterns: list[str] | None = None,
    *,
    heads: int | None = None,
    unknown: Unknown = Unknown.skip,
    **settings: Any,
) -> MonitorConfig:
    """Return the settings of a measurement, from the options; `settings` are fields of `MonitorConfig`."""
    return MonitorConfig.load(
        environment=False,
        layers=layer_filter(patterns) or LayerFilter(),
        capture=CaptureConfig(samples=batch, heads=heads, max_length=max(length, 2), unknown=unknown.value),
        **settings,
    )


def tau(config: MonitorConfig) -> str:
    """Return the tolerance in words."""
    of = " of each token's output" if config.tolerance_scale == "output" else ""
    return f"{config.tolerance:g}{of}"


def loaded(
    target: str,
    kwargs: str | None,
    checkpoint: Path | None,
    prefix: str,
    kind: InputKind,
    batch: int,
    length: int,
    width: int | None,
    vocab_size: int | None,
    seed: int,
) -> tuple[nn.Module, torch.Tensor]:
    """Return the model and the random batch that the options name."""
    model = load_model(target, kwargs, seed=seed)
    if checkpoint is not None:
        load_into(model, checkpoint, prefix=prefix)
    inputs = make_inputs(model, kind, batch=batch, length=length, width=width, vocab_size=vocab_size, seed=seed)
    return model, inputs


def run_on(model: nn.Module, inputs: torch.Tensor, function: Callable[..., T], **settings: Any) -> T:
    """Return `function(model, inputs, **settings)`.

    Raises:
        CaptureError: the model does not run on these inputs.
    """
    try:
        return function(model, inputs, **settings)
    except EssMonitorError:
        raise
    except Exception as error:  # from the model's own code: only the user knows which input it takes
        first_line = next(iter(str(error).splitlines()), "")
        raise CaptureError(
            f"input: {type(model).__name__} does not run on {inputs.dtype} of shape {tuple(inputs.shape)}: "
            f"{type(error).__name__}: {first_line}; set --input, --width, --vocab-size or --length to what it takes"
        ) from error


def initial_ess(
    label: str, width: int, num_heads: int, size: int, seeds: int, config: MonitorConfig
) -> tuple[float, float]:
    """Return the tolerance- and entropy-ESS of a new mixer of this row and TSS, averaged over the seeds."""
    name, options = FEATURIZER_ROWS[label]
    sizes = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        mixer = build_mixer(name, width, num_heads, size, **options)
        length = config.capture.max_length if isinstance(config.capture.max_length, int) else 0
        inputs = make_inputs(mixer, InputKind.gaussian, batch=1, length=length, width=width, seed=seed)
        [reading] = profile(mixer, inputs, config=config).readings
        if reading.effective_size is None or reading.entropy_size is None:
            raise CaptureError(f"featurizer {label} at TSS {size}: {reading.status}: {reading.message}")
        sizes.append((reading.effective_size, reading.entropy_size))
    return sum(size for size, _ in sizes) / seeds, sum(size for _, size in sizes) / seeds
