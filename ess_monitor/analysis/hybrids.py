"""Which layers of a hybrid would not miss a smaller state, or another mixer: advice, with what it rests on."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ess_monitor import validation
from ess_monitor.analysis.results import HybridAdvice, LayerAdvice, Mixer
from ess_monitor.capture import CaptureConfig, layer_infos
from ess_monitor.config import MonitorConfig
from ess_monitor.inspection import Progress, profile
from ess_monitor.records import Reading, layer_title

DEFAULTS = MonitorConfig(
    tolerance=0.1, tolerance_scale="output", positions=8, capture=CaptureConfig(samples=4, heads=None)
)
"""tau = 0.1 as in figure 30 of the paper, as a share of each token's output: operators of different kinds differ in
size."""

LITTLE, FULL = 0.5, 0.95
"""Shares of the attainable size: below the first a layer uses little, from the second on all of it."""
HOLDS = 0.8
"""Retention from which the decay is not what keeps the ESS low."""
NEAR = 0.1
"""Far share below which a layer looks back an eighth of the sequence at most."""

_MIXERS: dict[str, Mixer] = {
    "SoftmaxAttention": "attention",
    "Convolution": "filter",
    "GatedConvolution": "filter",
    "DenseOperator": "other",
    "JacobianOperator": "other",
}


def hybrid_advice(
    model: nn.Module,
    *inputs: Any,
    config: MonitorConfig | None = None,
    progress: Progress | None = None,
    **named_inputs: Any,
) -> HybridAdvice:
    """Return ESS, retention and far share of every mixer, ranked by what it uses, with advice and what it rests on.

    It is advice and not a proof. Section D.4.2 of the paper finds that the largest ESS among the attention layers goes
    along with accuracy, and that attention in the first layer collapses; nothing is known of other tasks. An ESS is a
    lower bound of the state that an approximation needs: try a change, and compare the loss.

    Args:
        model: a trained model; it is run once in eval mode, without gradients, and not changed.
        *inputs: arguments of its forward; advice is worth as much as these are typical.
        **named_inputs: the same by name.
        config: as in `profile`. Default: tau 0.1 of each token's output, 4 samples, all heads and 8 positions.
        progress: passes the layers on, such as `rich.progress.track`.

    Raises:
        NoLayersError: no layer of the model can be measured.
        CaptureError: with `config.strict`, a layer could not be measured.

    Examples:
        >>> import torch
        >>> from ess_monitor.analysis import hybrid_advice
        >>> from ess_monitor.featurizers import GLA, SA
        >>> hybrid = torch.nn.Sequential(GLA(16, 2), SA(16, 2))
        >>> [layer.mixer for layer in hybrid_advice(hybrid, torch.randn(2, 32, 16)).layers]
        ['recurrence', 'attention']
    """
    config = validation.optional("config", config, MonitorConfig) or DEFAULTS
    result = profile(model, *inputs, config=config, progress=progress, **named_inputs)
    found = layer_infos(model, config.layers, unknown=config.capture.unknown)
    infos = {info.name: info.operator for info in found}
    readings = result.readings
    order = sorted((each for each in readings if _share(each) is not None), key=lambda each: (_share(each), each.layer))
    ranks = {reading.layer: rank for rank, reading in enumerate(order, start=1)}
    layers = tuple(
        _advised(each, infos.get(each.layer, ""), ranks.get(each.layer), k) for k, each in enumerate(readings)
    )
    return HybridAdvice(
        model=result.model,
        tolerance=config.tolerance,
        tolerance_scale=config.tolerance_scale,
        layers=layers,
        notes=_notes(layers),
        skipped=result.skipped,
    )


def _share(reading: Reading) -> float | None:
    """Return the ESS as a share of what the sequence and the state allow."""
    if reading.status != "ok" or reading.effective_size is None or not reading.attainable_size:
        return None
    return reading.effective_size / reading.attainable_size


def _advised(reading: Reading, operator: str, rank: int | None, place: int) -> LayerAdvice:
    mixer = _MIXERS.get(operator, "recurrence")
    share = _share(reading)
    if share is None:
        message = reading.message or "it has no attainable size"
        status = "failed" if reading.status == "ok" else reading.status
        return LayerAdvice(layer=reading.layer, status=status, message=message, mixer=mixer, operator=operator)
    largest = max(reading.per_head, default=reading.effective_size or 0.0)
    advice, evidence = _words(reading, mixer, share, largest, place)
    return LayerAdvice(
        layer=reading.layer,
        status="ok",
        operator=operator,
        mixer=mixer,
        rank=rank,
        effective_size=reading.effective_size,
        largest_head=largest,
        state_capacity=reading.state_capacity,
        capacity_grows=reading.capacity_grows,
        used_ratio=share,
        retention_ratio=reading.retention_ratio,
        far_share_ratio=reading.far_share_ratio,
        advice=advice,
        evidence=evidence,
    )


def _words(reading: Reading, mixer: Mixer, share: float, largest: float, place: int) -> tuple[str, tuple[str, ...]]:
    """Return the advice for a layer, and what it rests on."""
    evidence = [f"uses {100 * share:.0f} % of the attainable size; its fullest head {largest:.1f} dimensions"]
    far, held = reading.far_share_ratio, reading.retention_ratio
    if far is not None:
        evidence.append(f"{100 * far:.0f} % of its outputs come from more than an eighth of the sequence back")
    if held is not None:
        evidence.append(f"retention {held:.2f}: what its ESS is of that without decay")
    size = max(1, math.ceil(largest))
    if place == 0 and (mixer == "attention" or (mixer == "recurrence" and share >= FULL)):
        evidence.append("it is the first mixer: there attention collapsed in the paper's hybrids and in ours (D.4.2)")
    if mixer == "attention":
        if far is not None and far < NEAR:
            return "try a window of tokens, or a recurrence: it hardly looks back", tuple(evidence)
        if share < LITTLE:
            return f"try a recurrence with a state of {size} or more per head", tuple(evidence)
        return "keep attention here", tuple(evidence)
    if mixer != "recurrence":
        return "no advice for this kind of layer", tuple(evidence)
    if share >= FULL and place == 0:
        return "a larger state may help; attention in the first place does harm", tuple(evidence)
    if share >= FULL:
        return "a larger state, or attention in this place, may help", tuple(evidence)
    if share < LITTLE and held is not None and held < HOLDS:
        return "check its decay before its state is made smaller: the decay costs memory", tuple(evidence)
    if share < LITTLE:
        return f"try a smaller state, of {size} or more per head", tuple(evidence)
    return "keep its state", tuple(evidence)


def _notes(layers: tuple[LayerAdvice, ...]) -> tuple[str, ...]:
    notes = ["Advice, not proof: try a change and compare the loss. An ESS bounds the state that is needed from below."]
    mixers = {layer.mixer for layer in layers}
    if len(mixers) == 1:
        notes.append(f"This is no hybrid: every measured mixer is of the kind {mixers.pop()}.")
    attention = [layer for layer in layers if layer.mixer == "attention" and layer.effective_size is not None]
    if attention:
        best = max(attention, key=lambda layer: layer.effective_size or 0.0)
        notes.append(
            f"Largest ESS among attention layers: {best.effective_size:.1f} in {layer_title(best.layer)}. In the paper "
            "it goes along with accuracy, more than their mean (figure 30c)."
        )
    return tuple(notes)
