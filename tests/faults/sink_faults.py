"""Faults of the sinks: disks, folders, writers, ports and peers."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import socket
from typing import Any

from ess_monitor import ExporterError, Monitor, MonitorConfig
from ess_monitor.exporters import (
    EventLogConfig,
    EventLogExporter,
    PrometheusConfig,
    PrometheusExporter,
    TensorBoardConfig,
    TensorBoardExporter,
    line_file,
    read_event_log,
)
from tests.faults.harness import SETTINGS, Injection, Outcome, backbone, case, hooks_of, train, watch

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
READ_ONLY = OSError(errno.EROFS, os.strerror(errno.EROFS))


@case("the disk is full from the second measurement on")
def disk_full(injection: Injection) -> Outcome:
    lines = []

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            lines.append(data)
            if len(lines) > 2:
                raise FULL
            return super().write(data)

    injection.patch.setattr(line_file.io, "FileIO", Full)
    path = injection.folder / "events.jsonl"
    run = watch(exporters=(EventLogExporter(EventLogConfig(path=path)),))
    events = read_event_log(path)
    return Outcome(
        run.unchanged,
        {
            "export errors": run.snapshot.export_errors_total == {"collecting": 0, "event_log": 6},
            "log": injection.said("exporter 'event_log' failed: OSError: [Errno 28] No space left on device") == 1,
            "turned off, once": injection.said("exporter 'event_log' is turned off after 5 errors") == 1,
            "what was written can be read": [e.event for e in events] == ["run_started", "measurement"],
            "other sinks go on": run.sink.steps == [0, 2, 4, 6, 8, 10],
        },
    )


@case("the log's folder is read-only when the log has to be rotated")
def log_folder_read_only(injection: Injection) -> Outcome:
    def refuse(*args: Any) -> None:
        raise READ_ONLY

    injection.patch.setattr(line_file.os, "replace", refuse)
    path = injection.folder / "events.jsonl"
    run = watch(exporters=(EventLogExporter(EventLogConfig(path=path, max_bytes=8192)),))
    return Outcome(
        run.unchanged,
        {
            "export errors": run.snapshot.export_errors_total["event_log"] > 0,
            "log": injection.said("exporter 'event_log' failed: OSError: [Errno 30] Read-only file system") == 1,
            "stays below its limit": 0 < path.stat().st_size <= 8192,
        },
    )


@case("every call of TensorBoard's writer raises from the third measurement on")
def tensorboard_writer_fails(injection: Injection) -> Outcome:
    from torch.utils.tensorboard import SummaryWriter

    with contextlib.closing(SummaryWriter(str(injection.folder))) as writer:
        real = writer.add_scalar

        def add_scalar(tag: str, value: float, global_step: int, **options: Any) -> None:
            if global_step >= 4:
                raise FULL
            real(tag, value, global_step=global_step, **options)

        injection.patch.setattr(writer, "add_scalar", add_scalar)
        run = watch(exporters=(TensorBoardExporter(TensorBoardConfig(heatmap_columns=0), writer=writer),))
    return Outcome(
        run.unchanged,
        {
            "export errors": run.snapshot.export_errors_total["tensorboard"] == 4,
            "log": injection.said("exporter 'tensorboard' failed: OSError: [Errno 28]") == 1,
            "other sinks go on": run.sink.steps == [0, 2, 4, 6, 8, 10],
        },
    )


@case("the port of the endpoint belongs to another process")
def port_taken(injection: Injection) -> Outcome:
    expected = train(backbone())
    model, message = backbone(), ""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = MonitorConfig.load(environment=False, **SETTINGS)
        monitor = Monitor(model, config, exporters=[PrometheusExporter(PrometheusConfig(port=port))])
        try:
            monitor.start()
        except ExporterError as error:
            message = str(error)
        hooks = hooks_of(model)
        result = train(model, after_step=lambda step, loss: monitor.step({"loss": loss}))
    return Outcome(
        result == expected,
        {
            "error at the start names the port": str(port) in message and "prometheus" in message,
            "nothing is attached": hooks == hooks_of(model) == 0,
        },
    )


@case("two runs with the same log folder and the same name, at the same time")
def two_runs_one_log_folder(injection: Injection) -> Outcome:
    path = injection.folder / "events.jsonl"
    board = TensorBoardConfig(log_dir=injection.folder, heatmap_columns=0)
    first_model, other = backbone("s6"), None

    def sinks() -> tuple[Any, ...]:
        return EventLogExporter(EventLogConfig(path=path)), TensorBoardExporter(board)

    settings = {**SETTINGS, "run_name": "same"}
    other = Monitor(first_model, MonitorConfig.load(environment=False, **settings), exporters=sinks())
    with other:
        train(first_model, after_step=lambda step, loss: other.step({"loss": loss}))
        run = watch(settings=settings, exporters=sinks())
        other.flush()
    events = read_event_log(path)
    kinds = [event.event for event in events]
    return Outcome(
        run.unchanged,
        {
            "both logs are whole": (kinds.count("run_started"), kinds.count("measurement"), kinds.count("run_finished"))
            == (2, 12, 2)
            and events.skipped_lines == 0,
            "no export error": set(run.snapshot.export_errors_total.values()) == {0},
            "TensorBoard has both": len(list((injection.folder / "same").glob("events.out.tfevents.*"))) >= 2,
        },
    )
