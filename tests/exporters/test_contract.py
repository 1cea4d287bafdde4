"""What every exporter promises, checked on every exporter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ess_monitor.errors import ExporterError
from ess_monitor.exporters import (
    EventLogConfig,
    EventLogExporter,
    Exporter,
    ExporterHub,
    LogExporter,
    LoggerExporter,
    PrometheusConfig,
    PrometheusExporter,
    TensorBoardConfig,
    TensorBoardExporter,
    TerminalConfig,
    TerminalExporter,
    TextfileConfig,
    TextfileExporter,
    WandbExporter,
)
from ess_monitor.records import ACTION_OUTCOMES, ACTIONS, LayerInfo, Measurement, Reading
from tests.exporters.helpers import (
    ODD_LAYERS,
    STATUSES,
    action,
    finding,
    measurement,
    reading,
    run_info,
    snapshot,
    threads_of_ours,
)

Make = Callable[[Path], Exporter]


def _injected_tensorboard(folder: Path) -> Exporter:
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardExporter(writer=SummaryWriter(str(folder / "injected")))


class WandbRun:
    """As a run of W&B before the loop has logged anything; tests/integrations/test_loggers.py has real ones."""

    step = 0

    def define_metric(self, name: str, **options: object) -> None: ...

    def log(self, data: dict, step: int | None = None, commit: bool | None = None) -> None: ...


MAKERS: dict[str, Make] = {
    "event_log": lambda folder: EventLogExporter(EventLogConfig(path=folder / "events.jsonl")),
    "log": lambda folder: LogExporter(),
    "logger": lambda folder: LoggerExporter("logger", lambda metrics, step: None),
    "prometheus": lambda folder: PrometheusExporter(PrometheusConfig(port=0)),
    "tensorboard": lambda folder: TensorBoardExporter(TensorBoardConfig(log_dir=folder / "tb")),
    "tensorboard_injected": _injected_tensorboard,
    "terminal": lambda folder: TerminalExporter(write=lambda text: None),
    "terminal_stderr": lambda folder: TerminalExporter(TerminalConfig(every_seconds=0)),
    "wandb": lambda folder: WandbExporter(WandbRun()),
    "textfile": lambda folder: TextfileExporter(TextfileConfig(path=folder / "ess.prom")),
}


@pytest.fixture(params=sorted(MAKERS))
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Exporter]:
    return lambda: MAKERS[request.param](tmp_path)


def _start(exporter: Exporter, layers: tuple[str, ...] = ("blocks.0.mixer", "blocks.1.mixer")) -> None:
    exporter.start(run_info(layers), lambda: snapshot())


def test_it_is_an_exporter_with_a_short_stable_name(make: Callable[[], Exporter]) -> None:
    exporter = make()
    assert isinstance(exporter, Exporter)
    assert exporter.name
    assert exporter.name == make().name
    assert isinstance(exporter.inline, bool)
    exporter.close("finished")


def test_start_export_close_in_order_leaves_no_thread(make: Callable[[], Exporter]) -> None:
    before = threads_of_ours()
    exporter = make()
    _start(exporter)
    for step in (100, 200, 300):
        exporter.export(measurement(step, findings=(finding(step=step),), actions=(action(step=step),)))
    exporter.close("finished")
    assert threads_of_ours() == before


def test_close_twice_does_nothing_the_second_time(make: Callable[[], Exporter], tmp_path: Path) -> None:
    exporter = make()
    _start(exporter)
    exporter.export(measurement())
    exporter.close("finished")
    sizes = {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    exporter.close("failed")
    assert {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()} == sizes


def test_close_without_start_does_nothing(make: Callable[[], Exporter]) -> None:
    before = threads_of_ours()
    exporter = make()
    exporter.close("failed")
    assert threads_of_ours() == before


def test_close_without_export_works(make: Callable[[], Exporter]) -> None:
    exporter = make()
    _start(exporter)
    exporter.close("failed")


def test_every_status_of_a_reading_is_exported(make: Callable[[], Exporter]) -> None:
    exporter = make()
    _start(exporter)
    readings = tuple(Reading(step=1, layer=f"layer.{status}", status=status, message="why") for status in STATUSES)
    exporter.export(measurement(1, readings=(reading("full", 1), *readings)))
    exporter.close("finished")


def test_every_action_with_every_outcome_is_exported(make: Callable[[], Exporter]) -> None:
    hub = ExporterHub([make()])
    hub.start(run_info(), lambda: snapshot())
    actions = tuple(action(action=kind, outcome=outcome) for kind in ACTIONS for outcome in ACTION_OUTCOMES)
    bare = action(strength=None, utilization_before=None, retention_before=None, message="", finding="")
    hub.export(measurement(1, actions=(*actions, bare)))
    hub.export(Measurement(step=2, timestamp_seconds=0.0, readings=(), conditions={}, actions=(action(step=2),)))
    hub.close("finished", timeout_seconds=30)
    assert set(hub.errors.values()) == {0}


def test_a_measurement_without_any_reading_is_exported(make: Callable[[], Exporter]) -> None:
    exporter = make()
    exporter.start(run_info(()), lambda: snapshot())
    exporter.export(Measurement(step=0, timestamp_seconds=0.0, readings=(), conditions={}))
    exporter.close("finished")


def test_odd_layer_names_are_exported(make: Callable[[], Exporter]) -> None:
    exporter = make()
    _start(exporter, ODD_LAYERS)
    for step in range(len(ODD_LAYERS)):
        findings = tuple(finding(layer) for layer in ODD_LAYERS)
        actions = tuple(action(layer, step) for layer in ODD_LAYERS)
        exporter.export(measurement(step, ODD_LAYERS, findings=findings, actions=actions))
    exporter.close("finished")


def test_layers_that_were_not_announced_are_exported(make: Callable[[], Exporter]) -> None:
    exporter = make()
    exporter.start(run_info(()), lambda: snapshot())
    exporter.export(measurement())
    exporter.close("finished")


def test_a_new_object_starts_where_the_old_one_has_closed(make: Callable[[], Exporter]) -> None:
    for _ in range(2):
        exporter = make()
        _start(exporter)
        exporter.export(measurement())
        exporter.close("finished")


def test_the_hub_runs_it_without_an_error(make: Callable[[], Exporter]) -> None:
    exporter = make()
    hub = ExporterHub([exporter])
    hub.start(run_info(), lambda: snapshot(export_errors_total=hub.errors))
    for step in range(10):
        hub.export(measurement(step))
    hub.close("finished", timeout_seconds=30)
    assert hub.errors == {exporter.name: 0}
    assert hub.dropped == {exporter.name: 0}


def test_start_with_an_empty_layer_info_shows_the_layer_as_not_measured(make: Callable[[], Exporter]) -> None:
    layer = LayerInfo(name="skipped", module="Mixer", supported=False, reason="unknown class")
    exporter = make()
    exporter.start(run_info(layers=(), versions={}, thresholds={}).model_copy(update={"layers": (layer,)}), snapshot)
    exporter.export(measurement())
    exporter.close("finished")


class FinishedRun(WandbRun):
    def define_metric(self, name: str, **options: object) -> None:
        raise RuntimeError("Run (abc) is finished")


def _unwritable(folder: Path) -> Path:
    (folder / "file").write_text("no folder")
    return folder / "file" / "below"


FAILING: dict[str, Make] = {
    "event_log": lambda folder: EventLogExporter(EventLogConfig(path=_unwritable(folder) / "events.jsonl")),
    "prometheus_certificate": lambda folder: PrometheusExporter(
        PrometheusConfig(port=0, certfile=folder / "missing.pem")
    ),
    "prometheus_address": lambda folder: PrometheusExporter(
        # A documentation address (RFC 5737): no machine has it.
        PrometheusConfig(host="192.0.2.1", port=0, allow_unauthenticated=True)
    ),
    "tensorboard": lambda folder: TensorBoardExporter(TensorBoardConfig(log_dir=_unwritable(folder))),
    "wandb": lambda folder: WandbExporter(FinishedRun()),
    "textfile": lambda folder: TextfileExporter(TextfileConfig(path=_unwritable(folder) / "ess.prom")),
}


@pytest.mark.parametrize("name", sorted(FAILING))
def test_a_start_that_fails_names_the_setting_and_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    exporter = FAILING[name](tmp_path)
    files, threads = set(tmp_path.rglob("*")), threads_of_ours()
    with pytest.raises(ExporterError, match=exporter.name) as caught:
        _start(exporter)
    assert any(word in str(caught.value) for word in ("Give", "Set")), "the message says what to do next"
    assert set(tmp_path.rglob("*")) == files
    assert threads_of_ours() == threads
    exporter.close("failed")
