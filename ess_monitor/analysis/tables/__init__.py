"""Tables of the results of analyses: what `print` and notebooks show of a result, and what its command prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ess_monitor.analysis.modulation_results import ShotsProfile, StateModulation
from ess_monitor.analysis.results import (
    AnalysisResult,
    Compressibility,
    HybridAdvice,
    LengthProfile,
    MinimalStates,
    Reduction,
)
from ess_monitor.analysis.study_results import Study
from ess_monitor.analysis.tables import layers, modulation, study

if TYPE_CHECKING:
    from rich.table import Table

_TABLES: dict[type[AnalysisResult], Callable[[Any, str | None], Table]] = {
    MinimalStates: layers.minimal_states_table,
    Compressibility: layers.compressibility_table,
    Reduction: layers.reduction_table,
    HybridAdvice: layers.hybrid_advice_table,
    LengthProfile: layers.length_profile_table,
    StateModulation: modulation.state_modulation_table,
    ShotsProfile: modulation.shots_profile_table,
    Study: study.study_table,
}


def table_of(result: AnalysisResult, title: str | None = None) -> Table:
    """Return the table of a result, under a title of its own or another one.

    Examples:
        >>> from ess_monitor.analysis import LengthProfile
        >>> empty = LengthProfile(model="LM", lengths=(64,), tolerance=1e-3, tolerance_scale="absolute", layers=())
        >>> str(table_of(empty).title), str(table_of(empty, "At first").title)
        ('LM, tau 0.001', 'At first')
    """
    return _TABLES[type(result)](result, title)
