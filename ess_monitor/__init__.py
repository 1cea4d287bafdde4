"""See how much of its memory a sequence model uses while it trains: effective state-size (ESS), arXiv 2504.19561."""

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
    "profile",
    "register_capture",
]
