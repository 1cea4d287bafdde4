"""Names the settings that every callback takes as keywords, for editors, `help()` and configuration files."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import Parameter, Signature, signature
from typing import Any, Literal, get_type_hints

from typing_extensions import TypedDict

from ess_monitor.capture import CaptureConfig, LayerFilter, ModulationConfig
from ess_monitor.config import MonitorConfig
from ess_monitor.diagnosis import DiagnosisConfig
from ess_monitor.distributed.config import DistributedConfig
from ess_monitor.evidence import EvidenceConfig
from ess_monitor.interventions import AutopilotConfig
from ess_monitor.runtime import RuntimeConfig

_KEYWORD = Parameter.KEYWORD_ONLY

# jsonargparse reads these types and the lines of the docstring, so that LightningCLI knows them.


class MonitorSettings(TypedDict, total=False):
    """Fields of `MonitorConfig`, which says more of each, in the forms that may be given; `exporters` is apart.

    Args:
        every_n_steps: Optimizer steps between two samples.
        overhead_budget_ratio: Share of the training time that the monitor may take; None never stretches the interval.
        tolerance: Singular values above it count (tau of the tolerance-ESS).
        tolerance_scale: Against what the tolerance is measured: 1, or what the layer puts out at each token.
        retention_every_n_samples: In every how many samples of a layer its retention is measured.
        positions: Where in the sequence H_i is measured: "midpoint", "all", or a number of positions.
        modulation: Separator tokens at which state modulation is measured: {"separators": [0]}.
        layers: Which layers: a pattern or several on their dotted names, or include and exclude.
        capture: How much of a forward pass is captured.
        runtime: Where the work runs.
        distributed: How the ranks of a distributed run measure together.
        diagnosis: From readings to conditions: task metric, thresholds, warm-up.
        evidence: What must support a collapse before a layer is called collapsed.
        autopilot: What may be done about a collapse: "off" (False, as YAML reads it), "advise", "auto", or settings.
        handle_sigterm: Record a run that is told to end as terminated; None does so under a scheduler.
        strict: Raise at the next step when a part of the monitor has failed; for tests.
        run_name: Name of the run in the exporters.
        hyperparameters: Facts of the run by name, for the event log; Lightning adds those of the module.
    """

    every_n_steps: int
    overhead_budget_ratio: float | None
    tolerance: float
    tolerance_scale: Literal["absolute", "output"]
    retention_every_n_samples: int
    positions: Literal["midpoint", "all"] | int
    modulation: ModulationConfig | dict[str, Any] | None
    layers: LayerFilter | str | Sequence[str] | dict[str, Any]
    capture: CaptureConfig | dict[str, Any]
    runtime: RuntimeConfig | dict[str, Any]
    distributed: DistributedConfig | dict[str, Any]
    diagnosis: DiagnosisConfig | dict[str, Any]
    evidence: EvidenceConfig | dict[str, Any]
    autopilot: Literal["off", "advise", "auto", False] | AutopilotConfig | dict[str, Any]
    handle_sigterm: bool | None
    strict: bool
    run_name: str | None
    hyperparameters: dict[str, bool | int | float | str | None]


def with_settings(init: Any) -> Signature:
    """Return the signature of a constructor, with every setting and its default in the place of `**settings`."""
    own, types, settings = signature(init).parameters, get_type_hints(init), get_type_hints(MonitorSettings)
    named = [each.replace(annotation=types[name]) for name, each in own.items() if name in types and name != "settings"]
    defaults = {name: MonitorConfig.model_fields[name].default for name in settings}
    return Signature(
        [*named, *(Parameter(name, _KEYWORD, default=defaults[name], annotation=settings[name]) for name in settings)]
    )
