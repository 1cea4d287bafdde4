"""Makes the states of a model smaller, and says what that costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ess_monitor import validation
from ess_monitor.analysis.layer_operators import NotAnalyzed, layers_of, smaller_states
from ess_monitor.analysis.results import LayerReduction, Reduction
from ess_monitor.analysis.smaller_model import (
    SmallerState,
    projection_of,
    recurrences_of,
    require_own_weights,
    settings_of,
    smaller_model,
    state_weights,
)
from ess_monitor.capture import CaptureConfig, Captured, LayerFilter, find_layers
from ess_monitor.capture.handles import StateWeights
from ess_monitor.capture.layers import check_model, evaluating
from ess_monitor.config import MonitorConfig
from ess_monitor.errors import CaptureError, ConfigError, format_error
from ess_monitor.ess import DiagonalRecurrence
from ess_monitor.inspection import Progress

Evaluate = Callable[[nn.Module], Mapping[str, float]]
"""Returns loss and metrics of a model, by name. It is called in eval mode and without gradients."""

DEFAULTS = MonitorConfig(capture=CaptureConfig(samples=16, heads=None, max_length=256))
"""16 sequences of 256 tokens decide which dimensions are kept."""
_PREDICTED_SAMPLES, _PREDICTED_HEADS = 2, 16
"""Of which the loss of the operator is given beside what `compressibility` says of the same."""

_METHODS = {
    "directions": "balanced truncation, folded into q and k",
    "dimensions": "the best dimensions",
    "first": "the first dimensions, because their decays follow from their numbers",
}


def reduce(
    model: nn.Module,
    *inputs: Any,
    state: int,
    evaluate: Evaluate | None = None,
    config: MonitorConfig | None = None,
    progress: Progress | None = None,
    **named_inputs: Any,
) -> tuple[nn.Module, Reduction]:
    """Return a copy of the model with smaller states, and what each of its layers lost.

    The copy has the same classes, and its weights load into them when they are built with the smaller state. A layer
    with a decay for each state dimension keeps those without which T changes least on these inputs; what is read from
    them is scaled by least squares where the layer reads linearly, to stand in for the others. Where a head decays as a
    whole and q and k are linear, any direction can be kept: the state is truncated in the balanced basis of all tokens,
    and the basis is folded into the projections of q and k. Between a projection and k or q a convolution or an
    activation allows neither: dimensions are chosen, and kept as they are.

    Every change is exact in the weights: on the same inputs the smaller layer applies the operator whose loss is given.
    Layers behind it see other inputs then, so measure the loss (`evaluate`), and train on if it is too much.

    Args:
        model: the model; it is run once in eval mode, without gradients, and not changed.
        *inputs: arguments of its forward: one batch that is typical of what it is to be used on.
        **named_inputs: the same by name.
        state: state dimensions per head, below those of the present layers. Layers that have no more stay as they are.
        evaluate: loss and metrics of a model, by name; called with the model and with the copy.
        config: `layers`, `capture` and `strict` are used. Default: 16 samples, all heads, 256 tokens.
        progress: passes the layers on, such as `rich.progress.track`.

    Returns:
        The smaller model, in the mode of the first one, and the numbers.

    Raises:
        ConfigError: `state` is not below the largest state of the layers.
        CaptureError: no layer can be made smaller, or the smaller model does not run.
        NoLayersError: no layer of the model can be measured.

    Examples:
        >>> import torch
        >>> from ess_monitor.analysis import reduce
        >>> from ess_monitor.featurizers import GLA
        >>> model, x = GLA(16, 2), torch.randn(2, 32, 16)
        >>> smaller, result = reduce(model, x, state=4)
        >>> _ = GLA(16, 2, expand_k=0.5).load_state_dict(smaller.state_dict())
        >>> [(layer.state_before, layer.state_after, layer.operator_loss < 1) for layer in result.layers]
        [(8, 4, True)]
    """
    check_model(model)
    config = validation.optional("config", config, MonitorConfig) or DEFAULTS
    if evaluate is not None:
        validation.function("evaluate", evaluate, hint="of a model, that returns its loss and metrics by name")
    state = validation.whole("state", state, 1, hint="the state dimensions per head to keep")
    _check_below(state, model, config.layers)
    smaller: dict[str, SmallerState] = {}
    analyze = partial(_analyzed, model=model, state=state, smaller=smaller)
    layers, skipped = layers_of(model, inputs, named_inputs, config, analyze, LayerReduction, progress)
    if not smaller:
        reasons = "; ".join(f"{layer.layer}: {layer.message}" for layer in layers)
        raise CaptureError(f"model: no state of {type(model).__name__} can be made smaller: {reasons}")
    with_state = [layer.name for layer in find_layers(model) if isinstance(state_weights(layer), StateWeights)]
    copy = smaller_model(model, list(smaller.values()), are_all=set(with_state) == set(smaller))
    try:
        with evaluating(copy):
            copy(*inputs, **named_inputs)
    except Exception as error:
        raise CaptureError(
            f"model: {type(model).__name__} does not run with smaller states ({format_error(error)}): its code depends "
            "on the state size in a way that is not known; exclude such layers with `layers`"
        ) from error
    before, after = ({} if evaluate is None else _evaluated(each, evaluate) for each in (model, copy))
    return copy, Reduction(
        model=type(model).__name__, state=state, layers=layers, before=before, after=after, skipped=skipped
    )


def _check_below(state: int, model: nn.Module, layers: LayerFilter | None) -> None:
    weights = [state_weights(layer) for layer in find_layers(model, layers)]
    sizes = [each.size for each in weights if isinstance(each, StateWeights)]
    if sizes and state >= max(sizes):
        raise ConfigError(
            f"state={state} must be below the states of {type(model).__name__}, which have up to {max(sizes)} "
            "dimensions per head"
        )


def _evaluated(model: nn.Module, evaluate: Evaluate) -> dict[str, float | None]:
    with evaluating(model):
        found = evaluate(model)
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"evaluate returned {validation.type_of(found)}; it must return numbers by name, as a mapping"
        )
    try:
        numbers = {str(name): float(value) for name, value in found.items()}
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor of several values
        raise ConfigError(f"evaluate must return numbers by name, as a mapping: {error}") from error
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


@torch.no_grad()
def _analyzed(
    captured: Captured, config: MonitorConfig, *, model: nn.Module, state: int, smaller: dict[str, SmallerState]
) -> LayerReduction:
    weights = state_weights(captured.layer)
    if isinstance(weights, str):
        raise NotAnalyzed("skipped", weights)
    if weights.size <= state:
        raise NotAnalyzed("skipped", f"its state has {weights.size} dimensions, and stays as it is")
    require_own_weights(model, captured.layer.module, weights)
    operator = captured.operator.map(Tensor.cpu)
    projection = projection_of(recurrences_of(operator, weights), weights, state)
    few = operator.select(samples=range(min(_PREDICTED_SAMPLES, operator.batch)))
    heads = min(_PREDICTED_HEADS, few.heads)
    predicted = smaller_states(replace(captured, operator=few.select(heads=range(heads))), lambda _: (state,))
    losses = [projection.lost(part) for part in few.longest_segments() if isinstance(part, DiagonalRecurrence)]
    lost, total = (float(sum(each[k][:, :heads].sum() for each in losses)) for k in (0, 1))
    smaller[captured.layer.name] = SmallerState(captured.layer.module, weights, projection, state)
    facts = predicted.facts(captured.layer.name)
    return LayerReduction(
        **{**facts, "message": "; ".join(filter(None, (weights.note, facts["message"])))},
        state_before=weights.size,
        state_after=state,
        method=_METHODS[weights.keeps] + (", what is read scaled" if _scales(weights) else ""),
        operator_loss=lost / total if total else 0.0,
        floor=predicted.floor(state),
        truncation=predicted.truncated(state),
        settings=settings_of(model, weights, state),
    )


def _scales(weights: StateWeights) -> bool:
    return weights.reads_linearly and weights.keeps != "directions"
