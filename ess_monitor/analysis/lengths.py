"""ESS and the decay of memory over the length of the sequence (figure 5a of the paper)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ess_monitor import validation
from ess_monitor.analysis.layer_operators import NotAnalyzed, layers_of
from ess_monitor.analysis.results import AtLength, LayerLengths, LengthProfile
from ess_monitor.capture import CaptureConfig, Captured
from ess_monitor.config import MonitorConfig
from ess_monitor.errors import ConfigError
from ess_monitor.ess import JacobianOperator, Operator, measure, operator_positions
from ess_monitor.ess.positions import LONGEST
from ess_monitor.inspection import Progress

DEFAULTS = MonitorConfig(capture=CaptureConfig(samples=2, heads=16))
"""Two samples, and 16 heads or channels of each layer."""


def length_profile(
    model: nn.Module,
    *inputs: Any,
    lengths: Sequence[int] = (64, 256, 1024),
    config: MonitorConfig | None = None,
    progress: Progress | None = None,
    **named_inputs: Any,
) -> LengthProfile:
    """Return ESS at the midpoint, and the norm of the product of A, of the first 64, 256, ... tokens (figure 5a).

    A state that keeps what it is given fills up with the length; one that decays forgets, and its ESS falls as the norm
    of A_L ... A_1 goes to 0 (section 4.2). The model is run once on the whole input: T is causal, so its crop is the
    exact operator of a shorter sequence.

    Args:
        model: the model; it is run once in eval mode, without gradients, and not changed.
        *inputs: arguments of its forward, at least as long as the largest of `lengths`.
        **named_inputs: the same by name.
        lengths: tokens from the start of each sequence, each at least 2.
        config: `tolerance`, `tolerance_scale`, `layers`, `capture` and `strict` are used, with the largest of `lengths`
            as `capture.max_length`. Default: 2 samples, 16 heads or channels, tau 1e-3.
        progress: passes the layers on, such as `rich.progress.track`.

    Raises:
        NoLayersError: no layer of the model can be measured.
        CaptureError: with `config.strict`, a layer could not be analyzed.
        ConfigError: `lengths` is empty, or one is below 2.

    Examples:
        >>> import torch
        >>> from ess_monitor.analysis import length_profile
        >>> from ess_monitor.featurizers import LA
        >>> [layer] = length_profile(LA(16, 2), torch.randn(1, 64, 16), lengths=[16, 64]).layers
        >>> [(at.length, at.state_capacity) for at in layer.lengths]
        [(16, 8.0), (64, 8.0)]
    """
    hint = "tokens from the start of each sequence"
    given = tuple(sorted(set(validation.wholes("lengths", lengths, 2, LONGEST, hint=hint))))
    if not given:
        raise ConfigError(f"lengths={validation.shown(lengths)} is empty; give {hint}, such as 64, 256 and 1024.")
    config = validation.optional("config", config, MonitorConfig) or DEFAULTS
    capture = config.capture.model_copy(update={"max_length": given[-1]})
    config = config.model_copy(update={"capture": capture})
    analyze = partial(_analyzed, lengths=given)
    layers, skipped = layers_of(model, inputs, named_inputs, config, analyze, LayerLengths, progress)
    return LengthProfile(
        model=type(model).__name__,
        lengths=given,
        tolerance=config.tolerance,
        tolerance_scale=config.tolerance_scale,
        layers=layers,
        skipped=skipped,
    )


def _analyzed(captured: Captured, config: MonitorConfig, *, lengths: tuple[int, ...]) -> LayerLengths:
    if isinstance(captured.operator, JacobianOperator):
        raise NotAnalyzed("skipped", "it is linearized on the whole input; profile inputs of several lengths instead")
    parts = captured.operator.longest_segments()
    found = [(length, [part for part in parts if part.length >= length]) for length in lengths]
    measured = tuple(_at(length, fitting, config) for length, fitting in found if fitting)
    if not measured:
        longest = max((part.length for part in parts), default=0)
        raise NotAnalyzed("too_short", f"the longest sequence has {longest} tokens; give lengths up to that")
    if any(each is None for each in measured):
        raise NotAnalyzed("nonfinite", "an input of its operator is NaN or infinite")
    missing = [str(length) for length, fitting in found if not fitting]
    return LayerLengths(
        layer=captured.layer.name,
        status="ok",
        message=f"no sequence has {' or '.join(missing)} tokens" if missing else "",
        operator=type(captured.operator).__name__,
        capacity_grows=captured.operator.capacity_grows,
        lengths=tuple(each for each in measured if each is not None),
    )


@torch.no_grad()
def _at(length: int, parts: Sequence[Operator], config: MonitorConfig) -> AtLength | None:
    """Return the means over all operators of the first `length` tokens; None where one is not finite."""
    positions = operator_positions(length, "midpoint")
    settings: dict[str, Any] = {"tolerance": config.tolerance, "tolerance_scale": config.tolerance_scale}
    measured = [measure(part.select(length=length), positions, **settings) for part in parts]
    if not all(bool(each.finite.all()) for each in measured):
        return None

    return AtLength(
        length=length,
        operators=sum(each.finite.numel() for each in measured),
        effective_size=_mean([each.tolerance_ess for each in measured]),
        entropy_size=_mean([each.entropy_ess for each in measured]),
        state_capacity=_mean([each.state_capacity for each in measured]),
        undecayed_size=_mean([each.undecayed_ess for each in measured]),
        decay_product_norm=_mean([each.decay_product_norm for each in measured]),
    )


def _mean(tensors: Sequence[Tensor | None]) -> float | None:
    values = [value for tensor in tensors if tensor is not None for value in tensor.flatten().tolist()]
    return statistics.fmean(values) if values else None
