"""Public names that are not called with wrong values, and why."""

from __future__ import annotations

_RESULT = "a result that the package makes and others read"
_ERROR = "an exception; its text is whatever it is raised with"
_TYPE = "a type or a constant, nothing that is called"
_PROTOCOL = "a protocol: what others implement"
_ADAPTER = "made by an adapter in this package, once a layer's code is read; `register_capture` is the checked way in"
_WORKER = "made by the monitor's own worker, of values that were checked before"

EXEMPT: dict[str, str] = {
    **dict.fromkeys(
        (
            "ess_monitor.CaptureError",
            "ess_monitor.CheckpointError",
            "ess_monitor.ConfigError",
            "ess_monitor.EssMonitorError",
            "ess_monitor.ExporterError",
            "ess_monitor.NoLayersError",
            "ess_monitor.OperatorError",
            "ess_monitor.PartError",
        ),
        _ERROR,
    ),
    **dict.fromkeys(
        (
            "ess_monitor.Description",
            "ess_monitor.Profile",
            "ess_monitor.capture.CaptureFailure",
            "ess_monitor.capture.Captured",
            "ess_monitor.capture.Layer",
            "ess_monitor.diagnosis.Verdict",
            "ess_monitor.ess.Bounds",
            "ess_monitor.ess.FarShare",
            "ess_monitor.ess.Measured",
            "ess_monitor.ess.Realization",
            "ess_monitor.analysis.Compressibility",
            "ess_monitor.analysis.HybridAdvice",
            "ess_monitor.analysis.LayerAdvice",
            "ess_monitor.analysis.LayerCompressibility",
            "ess_monitor.analysis.AtLength",
            "ess_monitor.analysis.LayerLengths",
            "ess_monitor.analysis.LayerMinimalState",
            "ess_monitor.analysis.LayerReduction",
            "ess_monitor.analysis.Reduction",
            "ess_monitor.analysis.LayerModulation",
            "ess_monitor.analysis.LengthProfile",
            "ess_monitor.analysis.MinimalStates",
            "ess_monitor.analysis.StateError",
            "ess_monitor.analysis.StateFor",
            "ess_monitor.analysis.StudentLoss",
            "ess_monitor.analysis.Correlation",
            "ess_monitor.analysis.CorrelationDifference",
            "ess_monitor.analysis.Study",
            "ess_monitor.analysis.StudyCell",
            "ess_monitor.analysis.StudyRun",
            "ess_monitor.analysis.ModulationAt",
            "ess_monitor.analysis.StateModulation",
            "ess_monitor.analysis.AtShots",
            "ess_monitor.analysis.LayerShots",
            "ess_monitor.analysis.ShotsProfile",
            "ess_monitor.analysis.Substitution",
            "ess_monitor.interventions.AlphaAdvice",
            "ess_monitor.interventions.AlphaCopy",
            "ess_monitor.report.Run",
            "ess_monitor.report.RunHistory",
            "ess_monitor.distributed.ConsensusResult",
            "ess_monitor.distributed.RankInfo",
            "ess_monitor.tasks.RecallPerplexity",
        ),
        _RESULT,
    ),
    **dict.fromkeys(
        (
            "ess_monitor.ess.Aggregation",
            "ess_monitor.ess.ToleranceScale",
            "ess_monitor.exporters.Event",
            "ess_monitor.exporters.ExporterConfig",
            "ess_monitor.featurizers.FEATURIZERS",
            "ess_monitor.tasks.IGNORED",
            "ess_monitor.tasks.SEPARATOR",
        ),
        _TYPE,
    ),
    **dict.fromkeys(
        ("ess_monitor.exporters.Exporter", "ess_monitor.runtime.ComputeBackend", "ess_monitor.runtime.Streams"),
        _PROTOCOL,
    ),
    **dict.fromkeys(
        (
            "ess_monitor.capture.AlphaHandle",
            "ess_monitor.capture.CaptureSpec",
            "ess_monitor.capture.DecayHandle",
            "ess_monitor.capture.Transition",
        ),
        _ADAPTER,
    ),
    **dict.fromkeys(
        (
            "ess_monitor.runtime.Job",
            "ess_monitor.runtime.StreamBackend",
            "ess_monitor.runtime.Task",
            "ess_monitor.runtime.TorchStreams",
            "ess_monitor.runtime.is_out_of_memory",
        ),
        _WORKER,
    ),
    "ess_monitor.distributed.RankReduction": "made by the schedule, from settings that were checked before",
    "ess_monitor.diagnosis.Context": "made by the tracker from what it has observed",
    "ess_monitor.ess.Operator": "abstract; what every operator inherits is called as `Operator.<method>`",
}
