"""The file for node_exporter: whole at every moment, and telling runs and ranks apart."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ess_monitor.errors import ConfigError, ExporterError
from ess_monitor.exporters import ExporterHub, RunIdentity, TextfileConfig, TextfileExporter
from tests.exporters.helpers import ODD_LAYERS, measurement, reading, run_info, snapshot


def _samples(path: Path) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
    }


def _value(path: Path, name: str, **labels: str) -> float | None:
    return _samples(path).get((f"ess_monitor_{name}", frozenset({"run_id": "a", "rank": "0", **labels}.items())))


def test_the_file_is_written_at_the_start_at_every_measurement_and_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ess.prom"
    step = 0
    exporter = TextfileExporter(TextfileConfig(path=path, run_id="a"))
    exporter.start(run_info(), lambda: snapshot(last_step=step))
    assert _value(path, "last_step") == 0
    step = 100
    exporter.export(measurement(100))
    assert _value(path, "last_step") == 100
    step = 200
    exporter.close("failed")
    assert _value(path, "last_step") == 200
    assert _value(path, "run_status", status="failed") == 1
    exporter.export(measurement(300))
    exporter.close("finished")
    assert _value(path, "run_status", status="failed") == 1
    assert list(path.parent.iterdir()) == [path], "no temporary file stays"


def test_every_series_says_which_run_and_which_rank(tmp_path: Path) -> None:
    config = TextfileConfig(path=tmp_path / "{run_id}-{rank}.prom", ranks="all")
    for rank in (0, 1):
        exporter = TextfileExporter(config, RunIdentity("a", rank, rank))
        exporter.start(run_info(), lambda: snapshot())
        exporter.close("finished")
    files = [tmp_path / "a-0.prom", tmp_path / "a-1.prom"]
    assert sorted(tmp_path.iterdir()) == files
    series = [set(_samples(path)) for path in files]
    assert len(series[0]) == len(series[1]) > 50
    assert not series[0] & series[1], "node_exporter drops series that two files have"
    assert {dict(labels)["rank"] for _, labels in series[1]} == {"1"}


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ess.prom"
    exporter = TextfileExporter(TextfileConfig(path=path))
    exporter.start(run_info(), lambda: snapshot())
    whole = path.read_bytes()
    done = threading.Event()

    def write() -> None:
        for _ in range(100):
            exporter.export(measurement())
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(path.read_bytes())
    writer.join()
    assert seen <= {whole}


def test_a_disk_that_takes_no_more_is_counted_and_the_last_whole_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ess.prom"
    hub = ExporterHub([TextfileExporter(TextfileConfig(path=path))])
    hub.start(run_info(), lambda: snapshot())
    whole = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    hub.export(measurement())
    hub.close("finished", timeout_seconds=30)
    assert hub.errors == {"textfile": 2}
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    exporter = TextfileExporter(TextfileConfig(path=tmp_path / "file" / "ess.prom"))
    with pytest.raises(ExporterError, match=r"textfile\.path=.*Give a path"):
        exporter.start(run_info(), lambda: snapshot())
    exporter.close("failed")


def test_a_rank_that_is_left_out_writes_nothing(tmp_path: Path) -> None:
    exporter = TextfileExporter(TextfileConfig(path=tmp_path / "ess.prom"), RunIdentity("a", rank=1, local_rank=1))
    exporter.start(run_info(), lambda: snapshot())
    exporter.export(measurement())
    exporter.close("finished")
    assert (exporter.path, list(tmp_path.iterdir())) == (None, [])


def test_a_file_that_node_exporter_would_not_read_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must end in \.prom"):
        TextfileConfig(path=Path("ess.txt"))


@pytest.mark.servers
def test_promtool_has_nothing_to_say(tmp_path: Path) -> None:
    exporter = TextfileExporter(TextfileConfig(path=tmp_path / "ess.prom"))
    exporter.start(run_info(ODD_LAYERS), lambda: snapshot(readings={name: reading(name) for name in ODD_LAYERS}))
    result = subprocess.run(
        ["promtool", "check", "metrics"], input=(tmp_path / "ess.prom").read_bytes(), capture_output=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    exporter.close("finished")
