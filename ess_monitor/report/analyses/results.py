"""Figures of the results of analyses, for notebooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from ess_monitor import validation
from ess_monitor.analysis.modulation_results import ShotsProfile, StateModulation
from ess_monitor.analysis.results import Compressibility, HybridAdvice, LengthProfile, MinimalStates, Reduction
from ess_monitor.analysis.study_results import Study
from ess_monitor.errors import ConfigError
from ess_monitor.records import Reading, layer_title
from ess_monitor.report.analyses.layers import (
    compressibility_figures,
    hybrid_advice_figures,
    length_profile_figures,
    minimal_state_figures,
    reduction_figures,
)
from ess_monitor.report.analyses.modulation import shots_profile_figures, state_modulation_figures
from ess_monitor.report.analyses.study import study_figures
from ess_monitor.report.components import depth_figure, present
from ess_monitor.report.figures import Figure
from ess_monitor.report.sections.layers import positions_over


@runtime_checkable
class Profiled(Protocol):
    """What `profile` returns: its class is not imported here, as it loads torch."""

    @property
    def skipped(self) -> Sequence[Any]: ...
    @property
    def readings(self) -> Sequence[Reading]: ...


_OVER_DEPTH = {
    "State dimensions of every layer": (
        ("ESS", "a", "effective_size"),
        ("entropy-ESS", "b", "entropy_size"),
        ("TSS", "limit", "state_capacity"),
    ),
    "Utilization and retention of every layer": (
        ("utilization", "a", "utilization_ratio"),
        ("retention", "b", "retention_ratio"),
        ("far share", "c", "far_share_ratio"),
    ),
}
"""Figures of a profile: label, kind of line, and field of `Reading`."""
_FIGURES: dict[type, Callable[[Any], tuple[Figure, ...]]] = {
    MinimalStates: minimal_state_figures,
    Compressibility: compressibility_figures,
    Reduction: reduction_figures,
    HybridAdvice: hybrid_advice_figures,
    LengthProfile: length_profile_figures,
    StateModulation: state_modulation_figures,
    ShotsProfile: shots_profile_figures,
    Study: study_figures,
}


def figures_of(result: Any) -> list[Any]:
    """Return the figures of a result as `plotly.graph_objects.Figure`s, to show, change or save.

    They are those of its page, which the command writes with `--html`. Of a `profile` they are the sizes and the ratios
    of all layers, and the ESS over the positions of the sequence, layer by layer. Layers without a result are left out.

    Args:
        result: what a function of `ess_monitor.analysis`, `load_study` or `profile` returned.

    Raises:
        ConfigError: the result is none of these, or plotly is not installed.

    Examples:
        >>> from ess_monitor.analysis import HybridAdvice, LayerAdvice
        >>> layers = [LayerAdvice(layer=name, status="ok", used_ratio=used) for name, used in (("a", 0.5), ("b", 0.25))]
        >>> result = HybridAdvice(model="Net", tolerance=0.1, tolerance_scale="output", layers=layers)
        >>> [(figure.layout.title.text, figure.data[0].y) for figure in figures_of(result)]
        [('Shares, 0 to 1', (0.5, 0.25))]
    """
    draw = _FIGURES.get(type(result), _profile_figures if isinstance(result, Profiled) else None)
    if draw is None:
        raise ConfigError(
            f"result: {validation.type_of(result)} has no figures here; give what a function of ess_monitor.analysis, "
            "load_study or profile returned (of reduce its numbers). Figures of a run: load_run(path).figure(name)"
        )
    return [figure.to_plotly() for figure in draw(result)]


def _profile_figures(result: Profiled) -> tuple[Figure, ...]:
    """Draw sizes and ratios over the depth of the model, and the ESS over the positions, layer by layer."""
    readings = [reading for reading in result.readings if reading.status == "ok"]
    figures = [
        depth_figure(
            title, [(label, kind, [getattr(each, name) for each in result.readings]) for label, kind, name in lines]
        )
        for title, lines in _OVER_DEPTH.items()
    ]
    positions = [positions_over(f"{layer_title(each.layer)}: ESS over positions", {"ESS": each}) for each in readings]
    return present(*figures, *positions)
