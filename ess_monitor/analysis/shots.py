"""How the number of shots in a prompt affects ESS (section D.6.2 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ess_monitor import validation
from ess_monitor.analysis.layer_operators import NotAnalyzed, layers_of
from ess_monitor.analysis.modulation_results import AtShots, LayerShots, ShotsProfile
from ess_monitor.capture import CaptureConfig, Captured
from ess_monitor.config import MonitorConfig
from ess_monitor.errors import ConfigError
from ess_monitor.ess import JacobianOperator, measure
from ess_monitor.ess.modulation import evenly_chosen
from ess_monitor.inspection import Progress

DEFAULTS = MonitorConfig(capture=CaptureConfig(heads=8))
"""8 heads or channels of each layer."""

POSITIONS = 32
"""Largest number of positions of the question at which ESS is measured."""


def shots_profile(
    model: nn.Module,
    prompts: Sequence[Tensor],
    *,
    question: int,
    config: MonitorConfig | None = None,
    progress: Progress | None = None,
    **named_inputs: Any,
) -> ShotsProfile:
    """Return the ESS of every layer at a question, behind 0, 1, 2, ... solved examples (shots; section D.6.2).

    At token t of the question, counted from 0, the past holds the shots and t tokens of the question, and the future
    the same tokens whatever the number of shots: H_i has more columns with more shots, and as many rows.

    Args:
        model: the model; it is run once on each prompt, in eval mode and without gradients.
        prompts: ids, (length,) each: the question behind no shot, behind one, and so on.
        question: how many of the last tokens of each prompt are the question, at least 2.
        config: `tolerance`, `tolerance_scale`, `layers`, `capture` and `strict` are used, on whole prompts. Default: 8
            heads or channels, tau 1e-3.
        progress: passes the prompts' layers on, such as `rich.progress.track`.
        named_inputs: further arguments of the forward.

    Raises:
        NoLayersError: no layer of the model can be measured.
        CaptureError: with `config.strict`, a layer could not be analyzed.
        ConfigError: there is no prompt, one is shorter than the question, or no ids.

    Examples:
        >>> import torch
        >>> from ess_monitor.analysis import shots_profile
        >>> from ess_monitor.featurizers import Backbone, BackboneConfig
        >>> model = Backbone(BackboneConfig(vocab_size=9, width=16, state_size=8))
        >>> ids = torch.arange(32).remainder(9)
        >>> first, _ = shots_profile(model, [ids[16:], ids], question=16).layers
        >>> [(at.shots, at.tokens) for at in first.at]
        [(0, 16), (1, 32)]
    """
    given = validation.listed("prompts", prompts, hint="ids of the question behind 0, 1, ... shots")
    asked = validation.whole("question", question, 2, hint="tokens of the question")
    if not given:
        raise ConfigError("prompts is empty; give ids of the question behind 0, 1, ... shots.")
    for ids in given:
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 1:
            raise ConfigError(f"prompts holds {validation.shown(ids)}; pass ids of shape (length,).")
        if len(ids) < asked:
            raise ConfigError(f"prompts holds one of {len(ids)} tokens, of which question={asked} cannot be the last.")
    config = validation.optional("config", config, MonitorConfig) or DEFAULTS
    found: dict[str, list[tuple[int, LayerShots]]] = {}
    for shots, ids in enumerate(given):
        capture = config.capture.model_copy(update={"samples": 1, "max_length": len(ids)})
        layers, skipped = layers_of(
            model,
            (ids[None],),
            named_inputs,
            config.model_copy(update={"capture": capture}),
            partial(_analyzed, shots=shots, tokens=len(ids), question=asked),
            LayerShots,
            progress,
        )
        for layer in layers:
            found.setdefault(layer.layer, []).append((shots, layer))
    return ShotsProfile(
        model=type(model).__name__,
        question=asked,
        tolerance=config.tolerance,
        tolerance_scale=config.tolerance_scale,
        layers=tuple(_together(each) for each in found.values()),
        skipped=skipped,
    )


@torch.no_grad()
def _analyzed(captured: Captured, config: MonitorConfig, *, shots: int, tokens: int, question: int) -> LayerShots:
    operator = captured.operator
    if isinstance(operator, JacobianOperator):
        raise NotAnalyzed("skipped", "a layer that is linearized takes too long at so many positions")
    if operator.length != tokens:
        raise NotAnalyzed("skipped", f"it was given {operator.length} tokens of {tokens}")
    offsets = evenly_chosen(range(1, question), POSITIONS)
    measured = measure(
        operator,
        [tokens - question + offset for offset in offsets],
        tolerance=config.tolerance,
        tolerance_scale=config.tolerance_scale,
        retention=False,
    )
    if not bool(measured.finite.all()):
        raise NotAnalyzed("nonfinite", "an input of its operator is NaN or infinite")
    along = measured.tolerance_ess.double().mean((0, 1)).tolist()
    at = AtShots(
        shots=shots,
        tokens=tokens,
        effective_size=sum(along) / len(along),
        entropy_size=float(measured.entropy_ess.double().mean()),
        offsets=offsets,
        along=tuple(along),
    )
    return LayerShots(layer=captured.layer.name, status="ok", operator=type(operator).__name__, at=(at,))


def _together(found: Sequence[tuple[int, LayerShots]]) -> LayerShots:
    """Return what was found of one layer in all prompts; a prompt without a result is named in the message."""
    good = [layer for _, layer in found if layer.status == "ok"]
    if not good:
        return found[0][1]
    failed = [f"{shots} shots: {layer.message}" for shots, layer in found if layer.status != "ok"]
    at = tuple(each for layer in good for each in layer.at)
    return good[0].model_copy(update={"at": at, "message": "; ".join(failed)})
