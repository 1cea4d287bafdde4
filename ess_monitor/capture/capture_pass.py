"""Run one synchronous forward pass and return its operators."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ess_monitor import validation
from ess_monitor.capture.captured import Captured, CaptureFailure
from ess_monitor.capture.causality.claims import claim_name, refuted
from ess_monitor.capture.causality.layer_tests import Test
from ess_monitor.capture.hooks.token_ids import ModulationConfig
from ess_monitor.capture.layers import (
    Layer,
    LayerFilter,
    Unknown,
    evaluating,
    find_layers,
    layer_infos,
    skipped_of_libraries,
)
from ess_monitor.capture.rotation import CaptureConfig
from ess_monitor.capture.sampler import Sampler
from ess_monitor.errors import CaptureError, NoLayersError
from ess_monitor.ess import Operator

EVERYTHING = CaptureConfig(samples=2**31, heads=None, max_length=None, source="validation")
"""Takes all samples, heads and tokens."""

logger = logging.getLogger("ess_monitor")


def require_layers(
    model: nn.Module, layers: LayerFilter | None = None, *, in_training: bool = False, unknown: Unknown = "skip"
) -> tuple[Layer, ...]:
    """Return `find_layers`, or raise `NoLayersError` with what was found and what to do.

    A library version that renamed every op must not stop a training: with `in_training` the result is then empty, and a
    warning says why.
    """
    reasons, are_all = skipped_of_libraries(model)
    if in_training and are_all and unknown == "skip":
        skipped = "; ".join(f"skipped: {reason}" for reason in reasons)
        logger.warning("%s. Nothing in %s can be measured: this run has no readings", skipped, type(model).__name__)
        return ()
    found = find_layers(model, layers, unknown=unknown)
    if not found:
        skipped = "; ".join(f"{info.name} ({info.module}): {info.reason}" for info in layer_infos(model, layers))
        raise NoLayersError(
            f"model: {type(model).__name__} has no sequence mixer that can be measured. "
            f"Skipped: {skipped or 'nothing looked like one'}. "
            "Use ess_monitor.describe(model) for the list, or teach your layer with ess_monitor.register_capture."
        )
    for reason in reasons:
        logger.warning("skipped: %s", reason)
    return found


def capture_pass(
    model: nn.Module,
    inputs: tuple[Any, ...],
    named_inputs: dict[str, Any],
    *,
    layers: LayerFilter | None = None,
    config: CaptureConfig = EVERYTHING,
    causality: Test | None = None,
    reduce: Callable[[Operator], Operator] | None = None,
    modulation: ModulationConfig | None = None,
) -> tuple[Captured | CaptureFailure, ...]:
    """Run `model(*inputs, **named_inputs)` once and return every layer's narrowed operator, or why it has none.

    Args:
        model, inputs, named_inputs: what is called.
        layers: the layers to read.
        config: how much of each to copy.
        causality: test of each layer, as in `Sampler`.
        reduce: of recurrences that are too long to be held, as in `Sampler`.
        modulation: which tokens are separators, likewise.
    """
    validation.instance("config", config, CaptureConfig)
    found = require_layers(model, layers, unknown=config.unknown)
    config = config.model_copy(update={"source": "validation"})
    sampler = Sampler(found, config, model=model, causality=causality, reduce=reduce, modulation=modulation)
    sampler.arm()
    try:
        with evaluating(model):
            model(*inputs, **named_inputs)
    finally:
        unread = sampler.unread()
        results = {item.layer.name: item for item in (*sampler.collect(), *unread)}
    return tuple(_looked_at(results[layer.name]) for layer in found)


def _looked_at(item: Captured | CaptureFailure) -> Captured | CaptureFailure:
    """Return why a layer is not measured where a statement of its call does not hold. Waits for the device."""
    claims = item.claims if isinstance(item, Captured) else ()
    reason = refuted(claims, {claim_name(k): claim.holds for k, claim in enumerate(claims)})
    return CaptureFailure(item.layer, reason, status="skipped") if reason else item


def raise_failures(items: Iterable[Captured | CaptureFailure]) -> None:
    """Raise `CaptureError` for the layers among `items` that could not be read."""
    problems = [f"{item.layer.name}: {item.error}" for item in items if isinstance(item, CaptureFailure)]
    if problems:
        raise CaptureError("could not read " + "; ".join(problems))


def capture_operators(model: nn.Module, *inputs: Any, **named_inputs: Any) -> dict[str, Operator]:
    """Return the operator y = T u of every sequence mixer, from one forward pass on `inputs`.

    Synchronous, in eval mode and without gradients; modes are restored and nothing stays attached. All samples, heads
    and positions are taken.

    Returns:
        Layer name -> operator (a class of `ess_monitor.ess`), in model order.

    Raises:
        NoLayersError: the model has no layer that can be measured.
        CaptureError: a layer could not be read; the message names it and says why. `profile` goes on without it.

    Examples:
        >>> import torch
        >>> from ess_monitor import capture_operators
        >>> from ess_monitor.featurizers import GLA
        >>> operators = capture_operators(GLA(16, 2), torch.randn(1, 8, 16))
        >>> [(name, type(op).__name__, op.heads) for name, op in operators.items()]
        [('model', 'DiagonalRecurrence', 2)]
    """
    items = capture_pass(model, inputs, named_inputs)
    raise_failures(items)
    return {item.layer.name: item.operator for item in items if isinstance(item, Captured)}
