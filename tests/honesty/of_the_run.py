"""`ess_monitor.exporters`, `ess_monitor.alerts`, `ess_monitor.report`, `ess_monitor.integrations`."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ess_monitor import alerts, exporters, report
from ess_monitor.analysis import (
    Compressibility,
    HybridAdvice,
    LengthProfile,
    MinimalStates,
    Reduction,
    ShotsProfile,
    StateModulation,
    Study,
)
from ess_monitor.exporters.event_log.events import MeasurementEvent, RunStartedEvent, encode_event
from ess_monitor.integrations.common import CallbackBase
from ess_monitor.pipeline.counters import RunCounters
from tests.exporters.test_contract import WandbRun
from tests.honesty.case import Case
from tests.honesty.data import HISTORY, MEASUREMENT, RUN

FOLDER = Path(tempfile.gettempdir()) / "ess-monitor-honesty"
"""Not made: what is refused writes nothing, and the calls that succeed write below folders of their own."""


def _configs() -> list[Any]:
    return [exporters.LogConfig(), exporters.PrometheusConfig(port=0), exporters.EventLogConfig()]


def _hub(**given: Any) -> None:
    hub = exporters.ExporterHub(**given)
    hub.start(RUN, RunCounters(["a"], wall_clock=lambda: 0.0).snapshot)
    hub.export(MEASUREMENT)
    hub.close("finished")


def _logged(**given: Any) -> None:
    exporter = exporters.LogExporter(**given)
    exporter.start(RUN, RunCounters(["a"], wall_clock=lambda: 0.0).snapshot)
    exporter.export(MEASUREMENT)


def _printed(**given: Any) -> None:
    exporter = exporters.TerminalExporter(**{"write": lambda text: None, **given})
    exporter.start(RUN, RunCounters(["a"], wall_clock=lambda: 0.0).snapshot)
    exporter.export(MEASUREMENT)
    exporter.export(MEASUREMENT)


def _recorded(**given: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = given.pop("config", None)
        if config is None or isinstance(config, exporters.EventLogConfig):
            config = exporters.EventLogConfig(path=Path(folder, "events.jsonl"))
        exporter = exporters.EventLogExporter(config, **given)
        exporter.start(RUN, RunCounters(["a"], wall_clock=lambda: 0.0).snapshot)
        exporter.export(MEASUREMENT)
        exporter.close("finished")


def _told(path: Any, run: Any = None, load: Any = report.load_history) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "events.jsonl")
        log.write_bytes(encode_event(RunStartedEvent(timestamp_seconds=0.0, run="demo", data=RUN)))
        return load(log if path == FOLDER else path, run)


def _studied(folder: Any, **given: Any) -> Any:
    with tempfile.TemporaryDirectory() as logs:
        common: dict[str, Any] = {"timestamp_seconds": 0.0, "run": "demo"}
        measured = MeasurementEvent(data=MEASUREMENT.model_copy(update={"metrics": {"accuracy": 0.5}}), **common)
        events = (RunStartedEvent(data=RUN, **common), measured)
        Path(logs, "events.jsonl").write_bytes(b"".join(map(encode_event, events)))
        return report.load_study(logs if folder == FOLDER else folder, **given)


def _opened(path: Any, run: Any = None) -> Any:
    return _told(path, run, load=report.load_run)


def _exported(**given: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        directory = given.pop("directory", FOLDER)
        return alerts.export(folder if directory == FOLDER else directory, **given)


EXPORTERS: dict[str, Case] = {
    "AuthConfig": Case(exporters.AuthConfig, lambda: {"secret_env": "ESS_SECRET"}),
    "EventLogConfig": Case(exporters.EventLogConfig),
    "EventLogExporter": Case(_recorded),
    "EventReader": Case(exporters.EventReader, exempt={"paths": "checked by `read_event_log`, which makes readers"}),
    "ExporterHub": Case(_hub),
    "LogConfig": Case(exporters.LogConfig),
    "LogExporter": Case(_logged),
    "LoggerExporter": Case(exporters.LoggerExporter, lambda: {"name": "csv", "log": lambda metrics, step: None}),
    "PrometheusConfig": Case(exporters.PrometheusConfig),
    "PrometheusExporter": Case(exporters.PrometheusExporter),
    "PushgatewayConfig": Case(exporters.PushgatewayConfig),
    "PushgatewayExporter": Case(exporters.PushgatewayExporter),
    "RunIdentity": Case(exporters.RunIdentity, lambda: {"run_id": "demo"}),
    "TensorBoardConfig": Case(exporters.TensorBoardConfig),
    "TensorBoardExporter": Case(exporters.TensorBoardExporter),
    "TerminalConfig": Case(exporters.TerminalConfig),
    "TerminalExporter": Case(_printed),
    "TextfileConfig": Case(exporters.TextfileConfig),
    "TextfileExporter": Case(exporters.TextfileExporter),
    "WandbExporter": Case(exporters.WandbExporter, lambda: {"run": WandbRun()}),
    "build_exporter": Case(exporters.build_exporter, lambda: {"config": exporters.LogConfig()}),
    "configs_of_rank": Case(exporters.configs_of_rank, lambda: {"configs": _configs(), "rank": 0, "local_rank": 0}),
    "read_event_log": Case(lambda **given: exporters.read_event_log(**given), lambda: {"path": "events.jsonl"}),
    "render_table": Case(exporters.render_table, lambda: {"measurement": MEASUREMENT, "layers": RUN.layers}),
    "scalars": Case(exporters.scalars, lambda: {"measurement": MEASUREMENT}),
}

ALERTS: dict[str, Case] = {
    "AlertsConfig": Case(alerts.AlertsConfig),
    "export": Case(_exported, lambda: {"directory": FOLDER}),
    "render": Case(alerts.render, lambda: {"config": alerts.AlertsConfig()}),
    "rule_groups": Case(alerts.rule_groups, lambda: {"config": alerts.AlertsConfig()}),
}

REPORT: dict[str, Case] = {
    "find_event_log": Case(report.find_event_log, lambda: {"path": Path(__file__)}, named={"path": "RUN_DIR"}),
    "figures_of": Case(report.figures_of, lambda: {"result": Study(metric="accuracy", demand="", runs=())}),
    "load_history": Case(_told, lambda: {"path": FOLDER}, named={"path": "RUN_DIR"}),
    "load_run": Case(_opened, lambda: {"path": FOLDER}, named={"path": "RUN_DIR"}),
    "load_study": Case(
        _studied,
        lambda: {"folder": FOLDER, "metric": "accuracy", "progress": iter},
        named={"folder": "RUN_DIR"},
    ),
    "render_comparison": Case(report.render_comparison, lambda: {"first": HISTORY, "second": HISTORY}),
    "render_compressibility": Case(
        report.render_compressibility,
        lambda: {"result": Compressibility(model="Net", student_states=(4,), layers=())},
    ),
    "render_state_modulation": Case(
        report.render_state_modulation,
        lambda: {"result": StateModulation(model="Net", separators=(0,), tolerance_scale="absolute", layers=())},
    ),
    "render_hybrid_advice": Case(
        report.render_hybrid_advice,
        lambda: {"result": HybridAdvice(model="Net", tolerance=0.1, tolerance_scale="output", layers=())},
    ),
    "render_length_profile": Case(
        report.render_length_profile,
        lambda: {
            "result": LengthProfile(model="Net", lengths=(64,), tolerance=1e-3, tolerance_scale="absolute", layers=())
        },
    ),
    "render_minimal_state": Case(
        report.render_minimal_state, lambda: {"result": MinimalStates(model="Net", layers=())}
    ),
    "render_reduction": Case(report.render_reduction, lambda: {"result": Reduction(model="Net", state=4, layers=())}),
    "render_shots_profile": Case(
        report.render_shots_profile,
        lambda: {
            "result": ShotsProfile(model="Net", question=8, tolerance=1e-3, tolerance_scale="absolute", layers=())
        },
    ),
    "render_study": Case(report.render_study, lambda: {"study": Study(metric="accuracy", demand="", runs=())}),
    "render_report": Case(report.render_report, lambda: {"history": HISTORY}),
}


def callback(module: str) -> Callable[..., CallbackBase]:
    made: Callable[..., CallbackBase] = importlib.import_module(module).ESSMonitorCallback
    return made


INTEGRATIONS: dict[str, dict[str, Case]] = {
    name: {
        "ESSMonitorCallback": Case(
            callback(f"ess_monitor.integrations.{name}"),
            lambda: {"config": {"every_n_steps": 5}},
            named={"config": "config|setting"},
        )
    }
    for name in ("lightning", "transformers", "fabric", "accelerate")
}
