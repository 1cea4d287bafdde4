"""What is asked of a finished or untrained model: the smallest state that does, what a smaller one costs.

Each function runs the model once, as `profile` does, and returns records: `.rows()`, `.to_dataframe()` and
`.model_dump(mode="json")`; `reduce` returns the smaller model beside them. The commands of the same names print them as
a table, as JSON or as an HTML page.

Names are imported at their first use: reports use the records, and must not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ess_monitor.analysis.correlation import correlate
    from ess_monitor.analysis.hybrids import hybrid_advice
    from ess_monitor.analysis.lengths import length_profile
    from ess_monitor.analysis.modulation_results import (
        AtShots,
        LayerModulation,
        LayerShots,
        ModulationAt,
        ShotsProfile,
        StateModulation,
        Substitution,
    )
    from ess_monitor.analysis.reduction import reduce
    from ess_monitor.analysis.results import (
        AtLength,
        Compressibility,
        HybridAdvice,
        LayerAdvice,
        LayerCompressibility,
        LayerLengths,
        LayerMinimalState,
        LayerReduction,
        LengthProfile,
        MinimalStates,
        Reduction,
        StateError,
        StateFor,
        StudentLoss,
    )
    from ess_monitor.analysis.separators import state_modulation
    from ess_monitor.analysis.shots import shots_profile
    from ess_monitor.analysis.smallest_states import minimal_state
    from ess_monitor.analysis.student_states import compressibility
    from ess_monitor.analysis.students import StudentTraining
    from ess_monitor.analysis.study_results import Correlation, CorrelationDifference, Study, StudyCell, StudyRun

__all__ = [
    "AtLength",
    "AtShots",
    "Compressibility",
    "Correlation",
    "CorrelationDifference",
    "HybridAdvice",
    "LayerAdvice",
    "LayerCompressibility",
    "LayerLengths",
    "LayerMinimalState",
    "LayerModulation",
    "LayerReduction",
    "LayerShots",
    "LengthProfile",
    "MinimalStates",
    "ModulationAt",
    "Reduction",
    "ShotsProfile",
    "StateError",
    "StateFor",
    "StateModulation",
    "StudentLoss",
    "StudentTraining",
    "Study",
    "StudyCell",
    "StudyRun",
    "Substitution",
    "compressibility",
    "correlate",
    "hybrid_advice",
    "length_profile",
    "minimal_state",
    "reduce",
    "shots_profile",
    "state_modulation",
]

_MODULES = {
    "minimal_state": "smallest_states",
    "compressibility": "student_states",
    "hybrid_advice": "hybrids",
    "length_profile": "lengths",
    "reduce": "reduction",
    "correlate": "correlation",
    **dict.fromkeys(("Correlation", "CorrelationDifference", "Study", "StudyCell", "StudyRun"), "study_results"),
    "state_modulation": "separators",
    "shots_profile": "shots",
    "StudentTraining": "students",
    **dict.fromkeys(("LayerModulation", "ModulationAt", "StateModulation", "Substitution"), "modulation_results"),
    **dict.fromkeys(("AtShots", "LayerShots", "ShotsProfile"), "modulation_results"),
}
"""Names, and the modules that they are in. All others are records, in `results`."""


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'results')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
