"""Beginning and end of the endpoint: which ranks have one, how it is found, how long it stays."""

from __future__ import annotations

import gc
import json
import os
import socket
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ess_monitor.errors import ConfigError, ExporterError
from ess_monitor.exporters import ExporterHub, PrometheusConfig, PrometheusExporter, RunIdentity
from ess_monitor.records import Snapshot
from tests.exporters.conftest import Certificate
from tests.exporters.helpers import free_port, measurement, run_info, snapshot, threads_of_ours
from tests.exporters.prometheus.scraping import ask
from tests.programs import ROOT, run_program

PATIENCE_SECONDS = 30.0


def _started(identity: RunIdentity | None = None, **settings: Any) -> PrometheusExporter:
    exporter = PrometheusExporter(PrometheusConfig(**{"port": 0, **settings}), identity=identity)
    exporter.start(run_info(), lambda: snapshot())
    return exporter


def _port(exporter: PrometheusExporter) -> int:
    assert exporter.url is not None
    return int(exporter.url.rpartition(":")[2].removesuffix("/metrics"))


def _eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_lingering_endpoint_shows_the_last_state_and_then_goes_by_itself() -> None:
    before = threads_of_ours()
    exporter = _started(linger_seconds=1.0)
    url = exporter.url
    exporter.close("finished")
    body = ask(url).body
    assert b'ess_monitor_run_status{status="finished"} 1.0' in body
    assert b'ess_monitor_run_status{status="running"} 0.0' in body
    assert _eventually(lambda: exporter.url is None)
    assert _eventually(lambda: threads_of_ours() <= before)
    with pytest.raises(OSError, match="refused"):
        ask(url)


def test_a_lingering_endpoint_keeps_numbers_and_not_the_model() -> None:
    class Model:
        def snapshot(self) -> Snapshot:
            return snapshot()

    model = Model()
    exporter = PrometheusExporter(PrometheusConfig(port=0, linger_seconds=600))
    exporter.start(run_info(), model.snapshot)
    alive = weakref.ref(model)
    del model
    exporter.close("finished")
    gc.collect()
    assert alive() is None
    assert ask(exporter.url).status == 200
    exporter.stop()


def test_stop_ends_lingering_at_once_and_a_second_close_does_not() -> None:
    before = threads_of_ours()
    exporter = _started(linger_seconds=600)
    port = _port(exporter)
    exporter.close("finished")
    exporter.close("failed")
    assert b'ess_monitor_run_status{status="finished"} 1.0' in ask(exporter.url).body
    exporter.stop()
    exporter.stop()
    assert exporter.url is None
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS)
    assert _eventually(lambda: threads_of_ours() <= before)


def test_the_next_run_in_the_process_takes_the_port_over_from_one_that_lingers(tmp_path: Path) -> None:
    port = free_port()
    settings = {"port": port, "linger_seconds": 600, "run_id": "same", "file_sd_dir": tmp_path}
    first = _started(**settings)
    first.close("finished")
    second = _started(**settings)
    assert first.url is None
    assert b'ess_monitor_run_status{status="running"} 1.0' in ask(second.url).body
    assert [path.name for path in tmp_path.iterdir()] == ["same-0.json"], "the entry is the second one's"
    with pytest.raises(ExporterError, match=rf"port {port} is in use.*port=0"):
        _started(port=port)  # one that is in use and does not linger keeps it
    second.stop()
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_that_fails_at_the_end_leaves_nothing_behind() -> None:
    before = threads_of_ours()
    exporter = PrometheusExporter(PrometheusConfig(port=0, linger_seconds=600))

    def fail() -> Snapshot:
        raise RuntimeError("broken")

    hub = ExporterHub([exporter])
    hub.start(run_info(), fail)
    hub.close("failed")
    assert hub.errors == {"prometheus": 1}
    assert exporter.url is None
    assert _eventually(lambda: threads_of_ours() <= before)


def test_the_end_of_the_interpreter_waits_for_no_lingering_and_takes_the_entry_along(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from ess_monitor.exporters import PrometheusConfig, PrometheusExporter
from tests.exporters.helpers import run_info, snapshot
exporter = PrometheusExporter(PrometheusConfig(port=0, linger_seconds=3600, file_sd_dir={str(tmp_path)!r}))
exporter.start(run_info(), lambda: snapshot())
exporter.close("finished")
print(len(list(Path({str(tmp_path)!r}).glob("*.json"))))
"""
    process = run_program(["-c", code], tmp_path.parent / "output", cwd=ROOT)
    assert (process.returncode, process.stdout, process.stderr) == (0, "1\n", "")
    assert list(tmp_path.iterdir()) == []


def test_the_entry_for_discovery_names_address_run_and_rank(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "targets"
    exporter = _started(RunIdentity("wla-7", rank=3, local_rank=3), ranks="all", file_sd_dir=folder)
    (path,) = folder.iterdir()
    assert path.name == "wla-7-3.json"
    assert json.loads(path.read_text()) == [
        {"targets": [f"127.0.0.1:{_port(exporter)}"], "labels": {"run_id": "wla-7", "rank": "3"}}
    ]
    assert path.stat().st_mode & 0o077 == 0o666 & ~_umask() & 0o077, "Prometheus runs as another user"
    exporter.close("finished")
    assert list(folder.iterdir()) == []


def test_the_entry_stays_while_the_endpoint_lingers(tmp_path: Path) -> None:
    exporter = _started(file_sd_dir=tmp_path, linger_seconds=600)
    exporter.close("finished")
    assert len(list(tmp_path.iterdir())) == 1
    exporter.stop()
    assert list(tmp_path.iterdir()) == []


def test_the_entry_of_an_https_endpoint_says_so_and_names_the_machine_where_all_addresses_are_bound(
    tmp_path: Path, certificate: Certificate
) -> None:
    settings = {**certificate._asdict(), "host": "0.0.0.0", "allow_unauthenticated": True, "file_sd_dir": tmp_path}
    for advertised in (None, "node7.cluster"):
        exporter = _started(**settings, run_id="wla-7", advertise_host=advertised)
        (entry,) = json.loads((tmp_path / "wla-7-0.json").read_text())
        assert entry["labels"]["__scheme__"] == "https"
        assert entry["targets"] == [f"{advertised or socket.gethostname()}:{_port(exporter)}"]
        exporter.close("finished")


def test_an_old_run_does_not_take_the_entry_of_a_new_one_along(tmp_path: Path) -> None:
    old = _started(file_sd_dir=tmp_path, run_id="same", linger_seconds=600)
    old.close("failed")
    new = _started(file_sd_dir=tmp_path, run_id="same")
    old.stop()
    (entry,) = json.loads((tmp_path / "same-0.json").read_text())
    assert entry["targets"] == [f"127.0.0.1:{_port(new)}"]
    new.close("finished")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_that_ends_leaves_the_entry_of_its_parent(tmp_path: Path) -> None:
    exporter = _started(file_sd_dir=tmp_path)
    child = os.fork()
    if child == 0:
        exporter.stop()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert len(list(tmp_path.iterdir())) == 1
    assert ask(exporter.url).status == 200
    exporter.close("finished")


def test_a_folder_that_cannot_be_written_is_an_error_at_the_start_and_frees_the_port(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    port, threads = free_port(), threads_of_ours()
    with pytest.raises(ExporterError, match=r"file_sd_dir=.*Give a folder"):
        _started(port=port, file_sd_dir=tmp_path / "file")
    assert threads_of_ours() == threads
    _started(port=port).close("finished")


def test_ranks_that_are_left_out_listen_to_nothing_and_do_nothing(tmp_path: Path) -> None:
    before = threads_of_ours()
    exporter = _started(RunIdentity("wla-7", rank=1, local_rank=1), ranks="local_zero", file_sd_dir=tmp_path)
    exporter.export(measurement())
    assert exporter.url is None
    assert exporter.identity == RunIdentity("wla-7", rank=1, local_rank=1)
    assert threads_of_ours() == before
    exporter.close("finished")
    assert list(tmp_path.iterdir()) == []


def test_the_first_process_of_a_machine_has_the_port_and_the_others_free_ones(tmp_path: Path) -> None:
    port = free_port()
    settings = {"port": port, "ranks": "all", "file_sd_dir": tmp_path}
    exporters = [_started(RunIdentity("wla-7", rank, rank % 4), **settings) for rank in (4, 5, 6)]
    ports = [_port(exporter) for exporter in exporters]
    assert ports[0] == port
    assert len(set(ports)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"wla-7-{rank}.json" for rank in (4, 5, 6)]
    for exporter in exporters:
        exporter.close("finished")


def test_all_ranks_without_a_folder_for_discovery_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"set file_sd_dir, or use ranks=\"local_zero\""):
        PrometheusConfig(ranks="all")


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
