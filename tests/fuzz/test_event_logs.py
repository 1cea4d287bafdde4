"""Whatever a file holds, the reader of event logs gives events and a count of the lines that are none."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ess_monitor.errors import ConfigError
from ess_monitor.exporters import read_event_log
from ess_monitor.exporters.event_log import events
from ess_monitor.exporters.event_log.events import (
    Event,
    FindingEvent,
    MeasurementEvent,
    RunFinishedEvent,
    RunStartedEvent,
    encode_event,
)
from ess_monitor.pipeline.counters import RunCounters
from ess_monitor.records import Finding, LayerInfo, Measurement, Reading, RunInfo
from ess_monitor.report import load_history, render_comparison, render_report
from tests.fuzz.inputs import SCALARS, damaged, fuzz, mutated, nested
from tests.report.helpers import unwanted_scripts

FINDING = Finding(step=3, layer="a", condition="collapsed", previous="unknown", reason="low")
READING = Reading(
    step=3, layer="a", status="ok", positions=(1, 2), per_head=(0.5,), per_position=(1.0, 2.0), effective_size=1.5,
    utilization_ratio=0.5, spectrum=(1.0, 0.5), spectrum_ranks=(1, 2),
)  # fmt: skip
RUN = RunInfo(run_name="demo", model="Net", layers=(LayerInfo(name="a", module="GLA", supported=True),))
LINES = [
    encode_event(event)
    for event in (
        RunStartedEvent(timestamp_seconds=1.0, run="demo", data=RUN),
        MeasurementEvent(
            timestamp_seconds=2.0,
            run="demo",
            data=Measurement(
                step=3,
                timestamp_seconds=2.0,
                readings=(READING,),
                conditions={"a": "collapsed"},
                findings=(FINDING,),
                metrics={"loss": 0.5},
            ),
        ),
        FindingEvent(timestamp_seconds=2.0, run="demo", data=FINDING),
        RunFinishedEvent(timestamp_seconds=3.0, run="demo", data=RunCounters(["a"], wall_clock=lambda: 0.0).snapshot()),
    )
]
PIECES = [
    b"\n", b"\r", b"{", b"}", b"[", b"]", b'"', b"\\ud800", b"\\u0000", b"NaN", b"1e999", b"null", b"-", b"9" * 400,
    b"\xff", b"\xef\xbb\xbf", b',"event":"finding"', b"true",
]  # fmt: skip


def dumped(value: object) -> bytes:
    return json.dumps(value, default=repr).encode() + b"\n"


PLAIN = SCALARS.filter(lambda value: not isinstance(value, int) or abs(value) < 10**4000)
DAMAGED = st.one_of(*(damaged(json.loads(line), nested(PLAIN)).map(dumped) for line in LINES))
LINE = st.one_of(
    st.sampled_from(LINES),
    *(mutated(line, PIECES) for line in LINES),
    DAMAGED,
    st.binary(max_size=40),
    st.sampled_from(PIECES).map(lambda piece: piece * 5000),
)


def write(folder: Path, content: bytes) -> Path:
    path = folder / "events.jsonl"
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


def at(seconds: bytes) -> bytes:
    return LINES[0].replace(b'"timestamp_seconds":1.0', b'"timestamp_seconds":' + seconds)


@fuzz(usual=150, long=6000)
@given(lines=st.lists(LINE, max_size=6))
@example([at(b"Infinity")])
@example([at(b'"1e999"')])
@example([at(b"9" * 400)])
def test_a_file_gives_events_and_a_count_of_the_other_lines(folder: Path, lines: list[bytes]) -> None:
    content = b"".join(lines)
    reader = read_event_log(write(folder, content))
    found: list[Event] = list(reader)
    assert len(found) + reader.skipped_lines == sum(bool(line.strip()) for line in content.split(b"\n"))
    for event in found:
        assert events.EVENT.validate_json(encode_event(event)) == event


@fuzz(usual=60, long=2000)
@given(lines=st.lists(st.one_of(st.sampled_from(LINES), DAMAGED), max_size=5))
@example([at(b"Infinity")])
@example([at(b"-1e308"), LINES[3].replace(b'"timestamp_seconds":3.0', b'"timestamp_seconds":1e308')])
def test_a_report_of_it_is_a_page_with_no_script_but_ours_or_our_error(folder: Path, lines: list[bytes]) -> None:
    whole = load_history(write(folder, b"".join(LINES)))
    try:
        history = load_history(write(folder, LINES[0] + b"".join(lines)))
        pages = render_report(history), render_comparison(history, whole), render_comparison(whole, history)
    except ConfigError:
        return
    assert not any(map(unwanted_scripts, pages))


def test_a_line_without_an_end_is_skipped_and_not_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MAX_LINE_BYTES", 4096)
    path = tmp_path / "events.jsonl"
    path.write_bytes(LINES[0] + b"x" * 20_000_000 + b"\n" + b"[" * 4095 + b"\n" + LINES[2] + b"y" * 5000)
    tracemalloc.start()
    try:
        reader = read_event_log(path)
        found = [event.event for event in reader]
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == ["run_started", "finding"]
    assert reader.skipped_lines == 3
    assert peak_bytes < 2_000_000


@pytest.mark.parametrize("length", range(4094, 4099))
def test_a_line_of_the_largest_size_is_one_line_however_it_ends(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MAX_LINE_BYTES", 4096)
    for end, after in itertools.product((b"\n", b""), (b"", LINES[2])):
        reader = read_event_log(write(tmp_path, b"x" * length + end + (after if end else b"")))
        assert [event.event for event in reader] == (["finding"] if end and after else [])
        assert reader.skipped_lines == 1
