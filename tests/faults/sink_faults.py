"""Faults of the exporters: disks, folders, writers, ports and peers."""

from __future__ import annotations

import contextlib
import errno
import http.server
import io
import os
import socket
import struct
import threading
from pathlib import Path
from typing import Any

from ess_monitor import ExporterError, Monitor, MonitorConfig
from ess_monitor.exporters import (
    EventLogConfig,
    EventLogExporter,
    PrometheusConfig,
    PrometheusExporter,
    PushgatewayConfig,
    PushgatewayExporter,
    TensorBoardConfig,
    TensorBoardExporter,
    read_event_log,
)
from ess_monitor.exporters.event_log import rotating_file as line_file
from ess_monitor.exporters.event_log.events import MeasurementEvent
from tests.exporters.prometheus.scraping import ask
from tests.faults.harness import (
    SETTINGS,
    Injection,
    Outcome,
    backbone,
    batches,
    case,
    hooks_of,
    loss_of,
    no_thread_stays,
    train,
    watch,
)

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
            "log": injection.said("exporter 'event_log' failed (OSError: [Errno 28] No space left on device)") == 1,
            "turned off, once": injection.said("exporter 'event_log' is off for the rest of this run") == 1
            and run.snapshot.health.exporters_off == ("event_log",),
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
            "log": injection.said("exporter 'event_log' failed (OSError: [Errno 30] Read-only file system") == 1,
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
            "log": injection.said("exporter 'tensorboard' failed (OSError: [Errno 28]") == 1,
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


@case("two runs with the same event log, which is rotated again and again while both write")
def two_runs_one_rotated_log(injection: Injection) -> Outcome:
    config = EventLogConfig(path=injection.folder / "events.jsonl", max_bytes=8192)
    older = injection.folder / "events.jsonl.1"
    deleted: list[tuple[str, int]] = []
    sizes: list[int] = []
    real = os.replace

    def replace(*paths: Any) -> None:
        deleted.extend(_measured(older))
        sizes.append(config.path.stat().st_size)
        real(*paths)

    injection.patch.setattr(line_file.os, "replace", replace)
    first_model = backbone("s6")
    # It writes rarely, so that the file is renamed more than once between two of its lines.
    seldom = MonitorConfig.load(environment=False, **{**SETTINGS, "run_name": "other", "every_n_steps": 6})
    with Monitor(first_model, seldom, exporters=[EventLogExporter(config)]) as other:

        def meanwhile(step: int, monitor: Monitor) -> None:
            loss = loss_of(first_model, batches()[step])
            loss.backward()
            for running in (monitor, other):  # one at a time, so that `replace` reads what a rotation deletes
                running.flush()
            other.step({"loss": loss})
            other.flush()

        often = {"run_name": "watched", "every_n_steps": 1}
        run = watch(settings=often, exporters=(EventLogExporter(config),), meanwhile=meanwhile)
    counts = [sum(snapshot.export_errors_total.values()) for snapshot in (run.snapshot, other.snapshot())]
    left = [*_measured(older), *_measured(config.path)]
    expected = [*(("watched", step) for step in range(12)), ("other", 0), ("other", 6)]
    return Outcome(
        run.unchanged,
        {
            "rotated, by design without its oldest lines": len(deleted) > 0,
            "no other line is lost": sorted(deleted + left) == sorted(expected),
            "no part is larger than its limit": max(*sizes, config.path.stat().st_size) <= config.max_bytes,
            "no export error": counts == [0, 0],
        },
    )


def _measured(path: Path) -> list[tuple[str, int]]:
    """Return run and step of the measurements in a log, if it exists."""
    events = list(read_event_log(path)) if path.exists() else []
    return [(event.run, event.data.step) for event in events if isinstance(event, MeasurementEvent)]


@case("peers send endless and senseless requests during the whole training")
def endpoint_flooded(injection: Injection) -> Outcome:
    exporter = PrometheusExporter(PrometheusConfig(port=0))
    over = threading.Event()
    flooding: list[threading.Thread] = []

    def flood(sent: bytes) -> None:
        port = int(str(exporter.url).rpartition(":")[2].partition("/")[0])
        peers: list[socket.socket] = []
        while not over.wait(0.05):
            with contextlib.suppress(OSError):
                peers.append(socket.create_connection(("127.0.0.1", port), timeout=1))
                peers[-1].sendall(sent)
            if len(peers) > 20:
                peers.pop(0).close()
        for peer in peers:
            peer.close()

    def meanwhile(step: int, monitor: Monitor) -> None:
        if step == 0:
            for sent in (b"GET /metrics HTTP/1.1\r\nx: ", b"GET /metrics HTTP/1.1\r\n\r\n", b"\0" * 4096, b""):
                flooding.append(threading.Thread(target=flood, args=(sent,)))
                flooding[-1].start()
        if step in (6, 11):
            answers.append(ask(exporter.url))

    answers: list[Any] = []
    try:
        run = watch(exporters=(exporter,), meanwhile=meanwhile)
    finally:
        over.set()
        for thread in flooding:
            thread.join()
    return Outcome(
        run.unchanged,
        {
            "scrapes are answered": [a.status for a in answers] == [200, 200],
            "with the present step": [b"last_step" in a.body for a in answers] == [True, True],
            "nothing else stops": run.sink.steps == [0, 2, 4, 6, 8, 10],
        },
    )


@case("Prometheus asks once, hangs up in the middle of the answer to its second request, and never comes again")
def prometheus_gone(injection: Injection) -> Outcome:
    exporter = PrometheusExporter(PrometheusConfig(port=0))
    answers: list[Any] = []
    before = threading.enumerate()

    def meanwhile(step: int, monitor: Monitor) -> None:
        if step == 2:
            answers.append(ask(exporter.url))
        if step == 4:
            host, _, port = str(exporter.url).removeprefix("http://").partition("/")[0].rpartition(":")
            with socket.create_connection((host, int(port)), timeout=5) as peer:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not closed
                peer.sendall(b"GET /metrics HTTP/1.1\r\nHost: it\r\n\r\n")
                peer.recv(1)

    run = watch(exporters=(exporter,), meanwhile=meanwhile)
    return Outcome(
        run.unchanged,
        {
            "the first scrape is answered": [answer.status for answer in answers] == [200],
            "measuring goes on": run.sink.steps == [0, 2, 4, 6, 8, 10],
            "no error, nothing waits": set(run.snapshot.export_errors_total.values()) == {0}
            and set(run.snapshot.export_queue_length.values()) == {0},
            "no thread stays": no_thread_stays(before),
        },
    )


@case("the Pushgateway that answered at the start is gone at the end")
def pushgateway_gone(injection: Injection) -> Outcome:
    gateway = http.server.HTTPServer(("127.0.0.1", 0), _Ready)
    serving = threading.Thread(target=gateway.serve_forever)
    serving.start()
    exporter = PushgatewayExporter(PushgatewayConfig(url=f"http://127.0.0.1:{gateway.server_port}", timeout_seconds=1))

    def meanwhile(step: int, monitor: Monitor) -> None:
        if step == 5:
            gateway.shutdown()
            gateway.server_close()

    run = watch(exporters=(exporter,), meanwhile=meanwhile)
    serving.join()
    return Outcome(
        run.unchanged,
        {
            "export errors": run.monitor.snapshot().export_errors_total["pushgateway"] == 1,
            "log": injection.said("exporter 'pushgateway' did not close cleanly") == 1,
            "measuring goes on": run.sink.steps == [0, 2, 4, 6, 8, 10],
        },
    )


class _Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Log nothing."""
