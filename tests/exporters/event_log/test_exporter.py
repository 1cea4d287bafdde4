"""The event log: what is written is read back, and a torn file is still a log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydantic
import pytest

from ess_monitor.exporters import EventLogConfig, EventLogExporter, ExporterHub, read_event_log
from ess_monitor.exporters.event_log.rotating_file import LineFile
from ess_monitor.exporters.event_log.schema import event_schema
from ess_monitor.records import SCHEMA_VERSION
from tests.exporters.event_log.json_schema import is_valid
from tests.exporters.helpers import (
    ODD_LAYERS,
    action,
    evidence,
    examined,
    finding,
    measurement,
    run_info,
    snapshot,
)


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


def test_evidence_is_read_back_and_a_log_of_before_it_was_written_still_reads(path: Path) -> None:
    by_outputs = examined("blocks.1.mixer", evidence("blocks.1.mixer", basis="kl", base=None, outcome="unclear"))
    plain = finding("blocks.0.mixer", 200)
    with _running(path) as exporter:
        exporter.export(measurement(200, findings=(examined(), by_outputs, plain)))
    assert [event.data for event in read_event_log(path) if event.event == "finding"] == [examined(), by_outputs, plain]
    old = path.with_name("old.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    old.write_text("".join(json.dumps(_without(line, {"evidence", "far_share_ratio"})) + "\n" for line in lines))
    assert '"evidence"' not in old.read_text()
    reader = read_event_log(old)
    findings = [event.data for event in reader if event.event == "finding"]
    assert [found.evidence for found in findings] == [None] * 3
    assert reader.skipped_lines == 0


def _without(content: object, names: set[str]) -> object:
    """JSON without these keys, at any depth."""
    if isinstance(content, dict):
        return {key: _without(value, names) for key, value in content.items() if key not in names}
    return [_without(item, names) for item in content] if isinstance(content, list) else content


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

    assert list(read_event_log(path, rotated=True)) == both
    assert list(read_event_log(path)) == both[-len(list(read_event_log(path))) :]


def test_reading_the_rotated_part_too_needs_none_and_needs_no_newer_one(path: Path) -> None:
    with _running(path):
        pass
    events = list(read_event_log(path))
    assert list(read_event_log(path, rotated=True)) == events
    path.rename(path.with_name("events.jsonl.1"))
    assert list(read_event_log(path, rotated=True)) == events
    with pytest.raises(FileNotFoundError):
        next(read_event_log(path))


def test_a_rotation_that_fails_is_an_error_and_the_next_may_succeed(path: Path) -> None:
    older = path.with_name("events.jsonl.1")
    with _running(path, max_bytes=11000) as exporter:
        (older / "full").mkdir(parents=True)  # nothing can be renamed onto a folder
        for step in range(3):
            exporter.export(measurement(step))
        size = path.stat().st_size
        with pytest.raises(OSError, match="events"):
            exporter.export(measurement(3, ODD_LAYERS))
        assert path.stat().st_size == size, "the log does not grow beyond its limit"
        (older / "full").rmdir()
        older.rmdir()
        exporter.export(measurement(4, ODD_LAYERS))
    assert older.stat().st_size == size
    assert [event.data.step for event in read_event_log(path) if event.event == "measurement"] == [4]


KILLED = """
import os, signal, sys, types
from itertools import count
from pathlib import Path
from typing import Any
package = types.ModuleType("ess_monitor")  # the room alone: it needs no tensor, and starts at once
package.__path__ = [sys.argv[1]]
sys.modules["ess_monitor"] = package
sys.path.insert(0, sys.argv[2])
from ess_monitor.exporters import EventLogConfig, EventLogExporter
from exporters.helpers import measurement, run_info, snapshot

exporter = EventLogExporter(EventLogConfig(path=Path(sys.argv[3])))
exporter.start(run_info(), snapshot)
real = exporter._file._file

class Torn:
    def write(self, data):
        real.write(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

for step in count():
    if sys.argv[4] == "in the middle of a line" and step == 20:
        exporter._file._file = Torn()
    exporter.export(measurement(step, tuple(f"layers.{index}" for index in range(24))))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("moment", ["at any time", "in the middle of a line"])
def test_a_process_killed_with_sigkill_loses_at_most_its_last_line(path: Path, moment: str) -> None:
    tests = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(tests.parent / "ess_monitor"), str(tests), str(path), moment]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    if moment == "at any time":
        while process.poll() is None and not (path.exists() and path.stat().st_size > 500_000):
            time.sleep(0.001)
        process.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors.decode()

    reader = read_event_log(path)
    events = list(reader)
    steps = [event.data.step for event in events if event.event == "measurement"]
    assert steps == list(range(len(steps)))
    assert len(steps) >= 20
    assert reader.skipped_lines == 1 if moment == "in the middle of a line" else reader.skipped_lines <= 1

    with _running(path):
        pass
    again = read_event_log(path)
    assert [event.event for event in again][len(events) :] == ["run_started", "run_finished"]
    assert again.skipped_lines == reader.skipped_lines


SCHEMA = Path(__file__).parents[3] / "docs" / "event-log.schema.json"


def without_details(schema: Any) -> Any:
    """The schema without what pydantic writes otherwise before 2.10: names of properties, constants, references."""
    if isinstance(schema, list):
        return [without_details(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    left_out = {"propertyNames", "allOf"} | ({"enum"} if "const" in schema else set())
    referred = schema.get("allOf", [{}])[0]
    return {**referred, **{name: without_details(value) for name, value in schema.items() if name not in left_out}}


def test_the_documented_schema_is_the_one_of_the_records() -> None:
    documented, written = json.loads(SCHEMA.read_text()), event_schema()
    if tuple(map(int, pydantic.VERSION.split(".")[:2])) < (2, 10):
        documented, written = without_details(documented), without_details(written)
    assert documented == written, (
        "the records have changed: python -m ess_monitor.exporters.event_log.schema > docs/event-log.schema.json, and "
        "raise SCHEMA_VERSION if a field changed its meaning or disappeared"
    )


def test_every_line_of_a_run_is_valid_under_the_documented_schema(path: Path) -> None:
    schema = json.loads(SCHEMA.read_text())
    with _running(path) as exporter:
        exporter.export(measurement(findings=(finding(), examined()), actions=(action(),)))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["event"] for line in lines} == set(schema["discriminator"]["mapping"])
    for line in lines:
        assert is_valid(line, schema)
        assert is_valid({**line, "a field of a later release": 1}, schema)
        assert not is_valid({**line, "schema_version": SCHEMA_VERSION + 1}, schema)
        assert not is_valid({**line, "timestamp_seconds": "yesterday"}, schema)
        assert not is_valid({**line, "event": "other"}, schema)
        assert not is_valid({name: line[name] for name in line if name != "data"}, schema)
        assert not is_valid({**line, "data": {**line["data"], next(iter(line["data"])): [None]}}, schema)


def test_every_field_with_a_sentence_in_the_records_has_it_in_the_schema() -> None:
    schema = event_schema()["$defs"]
    assert (
        schema["Reading"]["properties"]["utilization_ratio"]["description"] == "effective_size / state_capacity, 0..1."
    )
    assert schema["Finding"]["description"] == "A layer's condition changed."
    format_error = [
        name
        for record in schema.values()
        for name, field in record.get("properties", {}).items()
        if "description" in field
    ]
    assert len(format_error) > 40


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
