"""The event log: what is written is read back, and a torn file is still a log."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ess_monitor.exporters import EventLogConfig, EventLogExporter, ExporterHub, read_event_log
from ess_monitor.exporters.line_file import LineFile
from ess_monitor.records import SCHEMA_VERSION

from .helpers import ODD_LAYERS, action, finding, measurement, run_info, snapshot


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "below" / "events.jsonl"


def _exporter(path: Path, **settings: int) -> EventLogExporter:
    return EventLogExporter(EventLogConfig(path=path, **settings), clock=lambda: 5.0)


@contextmanager
def _running(path: Path, **settings: int) -> Iterator[EventLogExporter]:
    exporter = _exporter(path, **settings)
    exporter.start(run_info(), lambda: snapshot(steps_total=7))
    yield exporter
    exporter.close("finished")


def test_a_run_is_read_back_as_it_was_exported(path: Path) -> None:
    measurements = [measurement(100, ODD_LAYERS), measurement(200, findings=(finding(step=200),))]
    with _running(path) as exporter:
        for each in measurements:
            exporter.export(each)
    events = list(read_event_log(path))
    assert [event.event for event in events] == ["run_started", "measurement", "measurement", "finding", "run_finished"]
    assert [event.data for event in events] == [
        run_info(),
        *measurements,
        finding(step=200),
        snapshot("finished", steps_total=7),
    ]
    assert [event.timestamp_seconds for event in events] == [5.0, 1_000_100.0, 1_000_200.0, 1_000_200.0, 5.0]
    assert {event.run for event in events} == {"demo"}


def test_every_action_is_a_line_of_its_own_after_its_measurement(path: Path) -> None:
    actions = tuple(action(layer, 200, message="line\nbreak | \x1b", utilization_after=0.5) for layer in ODD_LAYERS)
    measured = measurement(200, findings=(finding(step=200),), actions=actions)
    with _running(path) as exporter:
        exporter.export(measured)
    _, *events, _ = read_event_log(path)
    assert [event.event for event in events] == ["measurement", "finding", *["action"] * len(actions)]
    assert [event.data for event in events] == [measured, finding(step=200), *actions]
    assert {event.timestamp_seconds for event in events} == {1_000_200.0}
    lines = [line for line in path.read_text().splitlines() if '"event":"action"' in line]
    assert len(lines) == len(actions), "the documented grep finds them"


def test_the_final_counters_of_interventions_are_read_back(path: Path) -> None:
    counters = {"interventions_total": {"pull_to_identity": {"applied": 2}}, "interventions_active": {"advise": 0}}
    exporter = _exporter(path)
    exporter.start(run_info(), lambda: snapshot(**counters, autopilot_enabled=True))
    exporter.close("finished")
    *_, last = read_event_log(path)
    assert last.data == snapshot("finished", **counters, autopilot_enabled=True)


def test_every_line_is_json_with_the_documented_keys(path: Path) -> None:
    with _running(path) as exporter:
        exporter.export(measurement(findings=(finding(),), actions=(action(),)))
    for line in path.read_text().splitlines():
        keys = json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
        assert set(keys) == {"schema_version", "event", "timestamp_seconds", "run", "data"}
        assert keys["schema_version"] == SCHEMA_VERSION


def test_a_measurement_is_on_disk_before_the_run_ends(path: Path) -> None:
    with _running(path) as exporter:
        exporter.export(measurement(100))
        assert [event.event for event in read_event_log(path)] == ["run_started", "measurement"]


def test_a_resumed_run_appends(path: Path) -> None:
    for _ in range(2):
        with _running(path):
            pass
    assert [event.event for event in read_event_log(path)] == ["run_started", "run_finished"] * 2


def test_a_torn_last_line_is_skipped_counted_and_ended_by_the_next_run(path: Path) -> None:
    with _running(path) as exporter:
        exporter.export(measurement())
    torn = path.read_bytes()[:-30]
    path.write_bytes(torn)
    reader = read_event_log(path)
    assert [event.event for event in reader] == ["run_started", "measurement"]
    assert reader.skipped_lines == 1
    with _running(path):
        pass
    reader = read_event_log(path)
    assert [event.event for event in reader] == ["run_started", "measurement", "run_started", "run_finished"]
    assert reader.skipped_lines == 1


def test_foreign_lines_are_skipped_and_counted(path: Path) -> None:
    with _running(path):
        pass
    good = path.read_text()
    newer = json.dumps({**json.loads(good.splitlines()[0]), "schema_version": SCHEMA_VERSION + 1})
    path.write_bytes(b'\xff\xfe\n{"event": "other"}\n[1, 2]\n\n   \n' + f"{newer}\n{good}".encode())
    reader = read_event_log(path)
    assert [event.event for event in reader] == ["run_started", "run_finished"]
    assert reader.skipped_lines == 4, "blank lines are no lines"


def test_a_missing_log_is_an_error(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        next(read_event_log(path))


def test_the_file_is_renamed_before_it_grows_too_large(path: Path) -> None:
    with _running(path, max_bytes=16_384) as exporter:
        for step in range(100):
            exporter.export(measurement(step))
    older = path.with_name("events.jsonl.1")
    assert {file.name for file in path.parent.iterdir()} == {"events.jsonl", "events.jsonl.1"}
    assert max(path.stat().st_size, older.stat().st_size) <= 16_384
    both = [*read_event_log(older), *read_event_log(path)]
    steps = [event.data.step for event in both if event.event == "measurement"]
    assert steps == list(range(steps[0], 100)), "the newest measurements are all there"
    assert [next(read_event_log(part)).event for part in (older, path)] == ["run_started"] * 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this platform has no /dev/full")
def test_a_full_disk_is_counted_by_the_hub_and_raises_nothing(path: Path) -> None:
    hub = ExporterHub([exporter := _exporter(path)])
    hub.start(run_info(), lambda: snapshot())
    file = exporter._file
    assert file is not None
    file.close()
    file.path = Path("/dev/full")
    file.open()
    for step in range(3):
        hub.export(measurement(step))
    hub.close("finished", timeout_seconds=30)
    assert hub.errors == {"event_log": 4}, "three measurements and the end of the run"


def test_a_line_that_was_written_in_part_is_ended_by_the_next(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = LineFile(path)
    file.open()
    real = file._file
    assert real is not None

    class Half:
        def write(self, data: bytes) -> int:
            return real.write(data[: len(data) // 2])

    monkeypatch.setattr(file, "_file", Half())
    with pytest.raises(OSError, match="only 4 of 8 bytes"):
        file.write(b"1234567\n")
    monkeypatch.setattr(file, "_file", real)
    file.write(b"next\n")
    file.close()
    assert path.read_bytes() == b"1234\nnext\n"
    assert file.size == path.stat().st_size
