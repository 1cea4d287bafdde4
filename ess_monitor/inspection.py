"""Inspect a model without training it: `describe` runs nothing, `profile` runs one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from ess_monitor import validation
from ess_monitor.capture import CaptureConfig, Captured, CaptureFailure, LayerFilter, find_layers, layer_infos
from ess_monitor.capture.capture_pass import capture_pass, raise_failures
from ess_monitor.capture.layers import probed_infos
from ess_monitor.capture.rotation import SHORT, USUAL_STATE
from ess_monitor.config import MonitorConfig
from ess_monitor.errors import CaptureError, format_error
from ess_monitor.ess import Operator
from ess_monitor.ess.cost import SampleShape
from ess_monitor.evidence.causality import is_causal
from ess_monitor.exporters.terminal.inspected import layer_table, reading_table
from ess_monitor.exporters.terminal.shown import Shown
from ess_monitor.pipeline.readings import compute, lost_reading, reading, reduce_long
from ess_monitor.records import LayerInfo, Reading
from ess_monitor.runtime.turns import samples_for_all

if TYPE_CHECKING:
    from rich.table import Table

DEFAULTS = MonitorConfig(positions=8, capture=CaptureConfig(samples=8, heads=None))
"""Finer than during training: 8 samples as in the paper's section 3, every head, 8 positions."""

Progress = Callable[[Sequence[Captured | CaptureFailure]], Iterable[Captured | CaptureFailure]]
"""Passes the layers on, one after another, and may show how far it is (`rich.progress.track`)."""

_ONE_HEAD = CaptureConfig(samples=1, heads=1)
_IN_A_RUN = MonitorConfig()
"""Settings of which `describe` says what a sample costs."""


@dataclass(frozen=True)
class Description(Shown):
    """The sequence mixers of a model, in model order."""

    model: str
    """Class of the model."""
    layers: tuple[LayerInfo, ...]
    """Every layer that mixes along the sequence; one that cannot be measured has a reason."""
    shapes: Mapping[str, SampleShape] = field(default_factory=dict)
    """By the name of each measured layer, what a sample measures of it at the default settings: 4 sequences, 4 heads
    and 3 positions, of at most 1024 tokens."""

    @property
    def supported(self) -> tuple[LayerInfo, ...]:
        """The layers a monitor would measure."""
        return tuple(layer for layer in self.layers if layer.supported)

    @property
    def sample_cost(self) -> str:
        """What a sample of all layers takes at the default settings, estimated from shapes; empty without layers."""
        if not self.shapes:
            return ""
        seconds = sum(shape.seconds for shape in self.shapes.values())
        size = sum(shape.bytes for shape in self.shapes.values())
        limit, budget = _IN_A_RUN.runtime.sample_seconds, _IN_A_RUN.overhead_budget_ratio
        samples = samples_for_all(self.shapes, limit)
        parts = [f"a sample of all layers takes about {seconds:.2g} s of one core and {size / 2**20:.0f} MiB"]
        if limit is not None and samples > 1:
            parts.append(f"at most {limit:g} s are taken at once, so layers take turns over {samples} samples")
        if budget is not None:
            parts.append(f"{budget:.0%} of the training time is one in {seconds / samples / budget:.0f} s")
        return "; ".join(parts)

    @property
    def _counted(self) -> str:
        return f"{self.model}: {len(self.supported)} of {len(self.layers)} sequence mixers can be measured"

    def __rich__(self) -> Table:
        return layer_table(self._counted, self.layers, self.sample_cost)

    def __str__(self) -> str:
        lines = [self._counted]
        for layer in self.layers:
            if layer.supported:
                size = "known after a forward pass" if layer.state_capacity is None else str(layer.state_capacity)
                size = "grows with the position" if layer.capacity_grows else size
                channels = f"{layer.channels or '?'} operators"
                handles = "; ".join(layer.handles) or "none"
                line = f"  {layer.name}: {layer.module}, {layer.operator}, TSS {size}, {channels}, handles: {handles}"
                lines.append(line + (f"; not diagnosed: {layer.uninformative}" if layer.uninformative else ""))
            else:
                lines.append(f"  {layer.name}: {layer.module}, skipped: {layer.reason}")
        return "\n".join([*lines, *filter(None, [self.sample_cost])])


def describe(model: nn.Module, *inputs: Any, layers: LayerFilter | None = None, **named_inputs: Any) -> Description:
    """Return every sequence-mixing layer with its operator, TSS and handles, or the reason why it cannot be measured.

    Mixers are found by their class, their code and their name. Where inputs are given the model is run, in eval mode,
    and what the outputs of its modules depend on corrects the list: all that mixes tokens is in it, nothing else, and a
    layer that looks at later tokens, or is not read on these inputs, is skipped.

    What a sample costs at the default settings is estimated from shapes (`ess_monitor.ess.cost`): without inputs for
    sequences of 1024 tokens. A run learns from its first samples by how much this is off on its machine.

    Args:
        model: any module; without inputs it is not run.
        *inputs: arguments of its forward, or none.
        **named_inputs: the same by name.
        layers: the same filter as `MonitorConfig.layers`; a layer that it excludes is listed as skipped.

    Raises:
        ConfigError: a pattern of `layers` matches no layer.

    Examples:
        >>> import torch
        >>> from ess_monitor import describe
        >>> from ess_monitor.featurizers import GLA, SA
        >>> print(describe(torch.nn.Sequential(GLA(16, 2), SA(16, 2))))
        Sequential: 2 of 2 sequence mixers can be measured
          0: GLA, DiagonalRecurrence, TSS 8, 2 operators, handles: decay: gate
          1: SA, SoftmaxAttention, TSS grows with the position, 2 operators, handles: none
        a sample of all layers takes about 0.34 s of one core and 5 MiB; 1% of the training time is one in 34 s
    """
    find_layers(model, layers)  # raises where a pattern matches nothing
    if not (inputs or named_inputs):
        return _described(model, layer_infos(model, layers), {})
    infos = probed_infos(model, inputs, named_inputs, layers)
    if not any(info.supported for info in infos):
        return _described(model, infos, {})
    items = capture_pass(model, inputs, named_inputs, layers=layers, config=_ONE_HEAD)
    # Without the layers that could not be read on these inputs, such as by a branch not taken.
    reasons = {item.layer.name: item.error for item in items if isinstance(item, CaptureFailure)}
    infos = tuple(
        info.model_copy(update={"supported": False, "reason": reasons[info.name]})
        if info.supported and info.name in reasons
        else info
        for info in infos
    )
    return _described(model, infos, {item.layer.name: item for item in items if isinstance(item, Captured)})


def _described(model: nn.Module, infos: tuple[LayerInfo, ...], captured: Mapping[str, Captured]) -> Description:
    shapes = {info.name: _shape(info, captured.get(info.name)) for info in infos if info.supported}
    costs = {name: {"sample_seconds": each.seconds, "sample_bytes": each.bytes} for name, each in shapes.items()}
    layers = tuple(info.model_copy(update=costs.get(info.name, {})) for info in infos)
    return Description(type(model).__name__, layers, shapes)


def _shape(info: LayerInfo, captured: Captured | None) -> SampleShape:
    """Return what a sample measures of a layer at the default settings."""
    config, measured = _IN_A_RUN.capture, None if captured is None else captured.shape
    channels = info.channels if captured is None or measured is None else captured.channels
    heads = min(config.heads or channels, channels or config.heads or 1)
    if measured is not None:
        return replace(measured, samples=config.samples, heads=heads, positions=_IN_A_RUN.positions)
    is_long = info.capacity_grows and info.operator in ("Convolution", "GatedConvolution")
    state = SHORT if is_long else info.state_capacity or USUAL_STATE
    return SampleShape(info.operator, state, config.samples, heads, SHORT, _IN_A_RUN.positions)


@dataclass(frozen=True)
class Profile(Shown):
    """Readings of every layer from one forward pass. `print` shows them as a table, as a notebook does."""

    model: str
    """Class of the model."""
    readings: tuple[Reading, ...]
    """One for each layer that `describe` calls measurable, in model order. One that could not be measured on these
    inputs has another status than ok, and a message that says why."""
    skipped: tuple[LayerInfo, ...] = ()
    """The other sequence mixers, each with the reason."""

    def __rich__(self) -> Table:
        measured = sum(reading.status == "ok" for reading in self.readings)
        title = f"{self.model}: {measured} of {len(self.readings) + len(self.skipped)} layers measured"
        return reading_table(title, self.readings, self.skipped)


def profile(
    model: nn.Module,
    *inputs: Any,
    config: MonitorConfig | None = None,
    progress: Progress | None = None,
    **named_inputs: Any,
) -> Profile:
    """Measure every sequence mixer on one batch, in eval mode and without gradients. The model is not changed.

    Args:
        model: the model.
        *inputs: arguments of its forward.
        **named_inputs: the same by name.
        config: `tolerance`, `tolerance_scale`, `positions`, `layers` and `capture` are used; the default measures 8
            samples, all heads and 8 positions; of sequences above 1024 tokens what `capture.max_length` says. With
            `strict` a layer that could not be measured is an error.
        progress: passes the layers on, such as `rich.progress.track`.

    Raises:
        NoLayersError: no layer of the model can be measured.
        CaptureError: with `config.strict`, a layer could not be read, or its spectrum could not be computed.

    Examples:
        >>> import torch
        >>> from ess_monitor import profile
        >>> from ess_monitor.featurizers import LA
        >>> [r.state_capacity for r in profile(LA(16, 2), torch.randn(2, 64, 16)).readings]
        [8.0]
    """
    config = validation.optional("config", config, MonitorConfig) or DEFAULTS
    reduce = partial(reduce_long, positions=config.positions, scale=config.tolerance_scale)
    items, skipped = captured_layers(model, inputs, named_inputs, config, progress, reduce)
    return Profile(type(model).__name__, tuple(_measured(item, config) for item in items), skipped)


def captured_layers(
    model: nn.Module,
    inputs: tuple[Any, ...],
    named_inputs: dict[str, Any],
    config: MonitorConfig,
    progress: Progress | None,
    reduce: Callable[[Operator], Operator] | None = None,
) -> tuple[Iterable[Captured | CaptureFailure], tuple[LayerInfo, ...]]:
    """Return what one forward pass shows of every layer that can be measured, and the other mixers with the reason.

    Args:
        model, inputs, named_inputs: what is called.
        config: `layers`, `capture` and `strict` are used.
        progress: passes the layers on.
        reduce: of recurrences that are too long to be held, as in `Sampler`.

    Raises:
        NoLayersError: no layer of the model can be measured.
        CaptureError: with `config.strict`, a layer could not be read.
    """
    if progress is not None:
        validation.function("progress", progress, hint="such as rich.progress.track")
    items = capture_pass(
        model,
        inputs,
        named_inputs,
        layers=config.layers,
        config=config.capture,
        causality=is_causal,
        reduce=reduce,
        modulation=config.modulation,
    )
    if config.strict:
        raise_failures(items)
    infos = layer_infos(model, config.layers, unknown=config.capture.unknown)
    return items if progress is None else progress(items), tuple(info for info in infos if not info.supported)


def _measured(item: Captured | CaptureFailure, config: MonitorConfig) -> Reading:
    if isinstance(item, CaptureFailure):
        return lost_reading(0, item.layer.name, item.status, item.error)
    try:
        scale, modulation = config.tolerance_scale, config.modulation
        computed = compute(item, config.positions, config.tolerance, scale, modulation)
        results = {name: value.cpu() for name, value in computed.items()}
        return reading(0, item, config.tolerance, results, scale, modulation)
    except Exception as error:
        if config.strict:
            raise CaptureError(f"could not measure {item.layer.name}: {format_error(error)}") from error
        return lost_reading(0, item.layer.name, "failed", format_error(error))
