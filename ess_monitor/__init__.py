"""See how much of its memory a sequence model uses while it trains: effective state-size (ESS), arXiv 2504.19561.

Names are imported at their first use: what reads event logs or writes alerting rules does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ess_monitor.capture import (
        CaptureCheck,
        CaptureConfig,
        LayerFilter,
        capture_operators,
        check_capture,
        register_capture,
    )
    from ess_monitor.config import MonitorConfig
    from ess_monitor.diagnosis import DiagnosisConfig
    from ess_monitor.errors import (
        CaptureError,
        CheckpointError,
        ConfigError,
        EssMonitorError,
        ExporterError,
        NoLayersError,
        OperatorError,
        PartError,
    )
    from ess_monitor.evidence import EvidenceConfig
    from ess_monitor.inspection import Description, Profile, describe, profile
    from ess_monitor.interventions import AutopilotConfig
    from ess_monitor.monitor import Monitor
    from ess_monitor.records import Action, Evidence, Finding, LayerInfo, Measurement, Reading, StateEvidence
    from ess_monitor.report import figures_of, load_run
    from ess_monitor.runtime import RuntimeConfig

__all__ = [
    "Action",
    "AutopilotConfig",
    "CaptureCheck",
    "CaptureConfig",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "Description",
    "DiagnosisConfig",
    "EssMonitorError",
    "Evidence",
    "EvidenceConfig",
    "ExporterError",
    "Finding",
    "LayerFilter",
    "LayerInfo",
    "Measurement",
    "Monitor",
    "MonitorConfig",
    "NoLayersError",
    "OperatorError",
    "PartError",
    "Profile",
    "Reading",
    "RuntimeConfig",
    "StateEvidence",
    "capture_operators",
    "check_capture",
    "describe",
    "figures_of",
    "load_run",
    "profile",
    "register_capture",
]

_OF_REPORTS = ("figures_of", "load_run")
"""Names of a package that the monitor does not know, and that loads no torch."""
_MODULES = (
    "errors",
    "records",
    "diagnosis",
    "config",
    "capture",
    "evidence",
    "inspection",
    "interventions",
    "monitor",
    "runtime",
)


def __getattr__(name: str) -> Any:
    if name in _OF_REPORTS:
        return globals().setdefault(name, getattr(import_module(f"{__name__}.report"), name))
    if name in __all__:
        for module in _MODULES:
            value = getattr(import_module(f"{__name__}.{module}"), name, None)
            if value is not None:
                return globals().setdefault(name, value)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")  # `import ess_monitor` makes its packages known too
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
