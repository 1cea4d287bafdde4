"""From the lines of a log to one run: resumed, restarted, rotated, torn or killed."""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from ess_monitor.cli.report import compare
from ess_monitor.errors import ConfigError
from ess_monitor.exporters import EventLogConfig, EventLogExporter
from ess_monitor.exporters.event_log.events import MeasurementEvent, RunStartedEvent, encode_event
from ess_monitor.records import RunInfo
from ess_monitor.report import find_event_log, load_history, render_comparison, render_report
from ess_monitor.report import history as history_module
from tests.report.helpers import (
    LAYERS,
    Page,
    action,
    finding,
    measurement,
    reading,
    rescued_run,
    run_info,
    snapshot,
    write_log,
)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "run" / "ess_events.jsonl"


def _steps(log: Path) -> list[int]:
    return [each.step for each in load_history(log).measurements]


def test_a_real_run_is_read_from_its_folder(real_log: Path) -> None:
    history = load_history(real_log.parent)
    assert history.path == real_log
    assert history.info.run_name == "a real run"
    assert history.layers == ("0", "1")
    assert len(history.measurements) == 10
    assert history.metric_names == ("loss",)
    assert [len(readings) for readings in history.readings.values()] == [10, 10]
    assert all(value > 0 for _, value in history.series("0", "effective_size"))
    assert history.final is not None
    assert history.final.status == "finished"
    assert history.skipped_lines == 0


def test_findings_and_actions_are_kept_once_although_the_log_holds_them_twice(log: Path) -> None:
    history = load_history(write_log(log, rescued_run()))
    assert [each.step for each in history.findings] == [400, 700]
    assert [each.step for each in history.actions] == [400]
    assert history.conditions == dict.fromkeys(LAYERS, "healthy")


def test_a_run_resumed_from_a_checkpoint_drops_what_came_after_it_the_first_time(log: Path) -> None:
    late = measurement(400, findings=(finding(LAYERS[1], 400),), actions=(action(LAYERS[1], 402),))
    write_log(log, [measurement(step) for step in (0, 100, 200, 300)] + [late], finished="failed")
    write_log(log, [measurement(step) for step in (300, 400)], run_info(start_timestamp_seconds=1_700_000_500.0))
    history = load_history(log)
    assert [each.step for each in history.measurements] == [0, 100, 200, 300, 400]
    assert (history.findings, history.actions) == ((), ())
    assert history.resumed_at == (300,)
    assert history.earlier_runs == 0
    assert history.start_seconds == 1_700_000_000.0


@pytest.mark.parametrize("later", [run_info(model="Other"), run_info(("other",))], ids=["model", "layers"])
def test_a_run_of_another_model_is_another_run(log: Path, later: RunInfo) -> None:
    write_log(log, [measurement(0), measurement(100)])
    write_log(log, [measurement(200)], later)
    history = load_history(log)
    assert ([each.step for each in history.measurements], history.earlier_runs) == ([200], 1)


def test_a_run_that_began_again_is_another_run(log: Path) -> None:
    write_log(log, [measurement(0), measurement(100)])
    write_log(log, [measurement(0)], run_info(start_timestamp_seconds=1_700_000_500.0))
    history = load_history(log)
    assert ([each.step for each in history.measurements], history.earlier_runs) == ([0], 1)
    assert history.start_seconds == 1_700_000_500.0


def test_a_rotated_log_is_one_run(log: Path) -> None:
    exporter = EventLogExporter(EventLogConfig(path=log, max_bytes=24_000))
    exporter.start(run_info(), snapshot)
    for step in range(30):
        exporter.export(measurement(step))
    exporter.close("finished")
    older = log.with_name("ess_events.jsonl.1")
    history = load_history(log.parent)
    steps = [each.step for each in history.measurements]
    assert older.exists()
    assert steps == list(range(steps[0], 30))
    assert (history.resumed_at, history.earlier_runs, history.skipped_lines) == ((), 0, 0)
    log.unlink()
    assert _steps(log.parent) == steps[: len(_steps(log.parent))], "killed between renaming and beginning anew"


def test_a_killed_run_has_no_end_and_its_torn_line_is_counted(log: Path) -> None:
    write_log(log, [measurement(0), measurement(100)], finished=None)
    log.write_bytes(log.read_bytes()[:-40])
    history = load_history(log)
    assert history.final is None
    assert history.skipped_lines == 1
    assert [each.step for each in history.measurements] == [0]


def test_a_very_long_run_is_thinned_and_keeps_its_findings(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "MEASUREMENTS_KEPT", 8)
    measurements = [measurement(step, findings=(finding(LAYERS[0], step),)) for step in range(50)]
    history = load_history(write_log(log, measurements))
    assert history.thinned == 8
    assert [each.step for each in history.measurements] == list(range(0, 50, 8))
    assert len(history.findings) == 50


def test_a_run_of_many_layers_is_thinned_sooner(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "READINGS_KEPT", 8 * len(LAYERS))
    history = load_history(write_log(log, [measurement(step) for step in range(50)]))
    assert (history.thinned, len(history.measurements)) == (8, 7)
    assert sum(map(len, history.readings.values())) <= 8 * len(LAYERS)


def test_a_layer_that_was_never_announced_is_listed_too(log: Path) -> None:
    history = load_history(write_log(log, [measurement(0, ("late",))], run_info(("early",))))
    assert history.layers == ("early", "late")
    assert history.ok("early") == ()
    assert history.layer("late").module == ""


def test_only_readings_with_sizes_make_a_curve(log: Path) -> None:
    bad = reading(LAYERS[0], 100, status="nonfinite", effective_size=None)
    history = load_history(write_log(log, [measurement(0), measurement(100, readings=(bad,)), measurement(200)]))
    assert [step for step, _ in history.series(LAYERS[0], "effective_size")] == [0, 200]
    newest = history.at(LAYERS[0], 199)
    assert newest is not None
    assert newest.step == 0
    assert history.at(LAYERS[0], -1) is None


def test_the_loss_comes_first_whatever_it_is_called(log: Path) -> None:
    metrics = {"accuracy": 0.5, "train/Loss": 1.0, "loss": 1.0}
    assert load_history(write_log(log, [measurement(0, metrics=metrics)])).metric_names == (
        "loss",
        "train/Loss",
        "accuracy",
    )


def test_a_folder_with_one_log_somewhere_below_it_is_enough(log: Path) -> None:
    write_log(log, [])
    (log.parent / "other.jsonl").write_text('{"step": 1}\n')
    assert find_event_log(log.parents[1]) == log


def test_what_is_no_run_is_refused_with_the_way_out(tmp_path: Path, log: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_history(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"no event log.*event_log"):
        load_history(tmp_path)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("{}\nnot json\n")
    with pytest.raises(ConfigError, match=r"holds no run: 2 lines"):
        load_history(empty)


def _written(log: Path, seconds: int) -> Path:
    os.utime(log, (seconds, seconds))
    return log


def test_of_several_logs_in_a_folder_the_one_that_was_written_last_is_read(log: Path, tmp_path: Path) -> None:
    third = _written(write_log(tmp_path / "c" / "a.jsonl", [measurement(3)]), 3000)
    _written(write_log(log, [measurement(1)]), 1000)
    second = write_log(log.with_name("second.jsonl"), [measurement(2)])
    assert find_event_log(tmp_path) == second
    _written(second, 2000)
    assert find_event_log(tmp_path) == third
    # A run that was killed during a rotation has left the older part alone.
    os.rename(log, log.with_name(log.name + ".1"))
    _written(log.with_name(log.name + ".1"), 4000)
    assert find_event_log(tmp_path) == log
    assert _steps(tmp_path) == [1]


def _three_runs(log: Path) -> Path:
    for number, name in enumerate(("first", "3", "first"), start=1):
        info = run_info(run_name=name, start_timestamp_seconds=1_700_000_000.0 + 1000 * number)
        write_log(log, [measurement(step) for step in (0, 10 * number)], info)
    return log


@pytest.mark.parametrize(
    ("run", "step"), [(None, 30), ("first", 30), ("3", 20), (3, 20), (1, 10), ("1", 10), (2, 20), ("2", 20)]
)
def test_a_run_of_a_log_is_found_by_its_name_or_its_number(log: Path, run: str | int | None, step: int) -> None:
    history = load_history(_three_runs(log), run)
    assert [each.step for each in history.measurements] == [0, step]
    assert history.earlier_runs == step // 10 - 1


@pytest.mark.parametrize("run", ["second", "4", "0", "-1", "", 4])
def test_a_run_that_a_log_does_not_hold_is_an_error_that_lists_them(log: Path, run: str | int) -> None:
    with pytest.raises(ConfigError, match=r"run: .* holds no .*one of its 3 runs: 1 first, 2 3, 3 first"):
        load_history(_three_runs(log), run)


def test_a_run_is_not_compared_with_itself(log: Path, tmp_path: Path) -> None:
    _three_runs(log)
    (link := log.with_name("link.jsonl")).symlink_to(log)
    page = tmp_path / "page.html"
    for one, other, options in (
        (log, log, {}), (log.parent, log, {}), (log, link, {}), (log, log, {"which_a": "first"}),
        (log, log, {"which_a": "2", "which_b": "3"}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"are one run, (first|3) in .*--run-a and --run-b"):
            compare(one, other, str(page), **options)
    assert not page.exists()
    compare(log, log, str(page), which_a="1")
    assert "step 0" in Page(page.read_text()).text


BOM = b"\xef\xbb\xbf"
REWRITTEN: dict[str, Callable[[bytes], bytes]] = {
    "BOM": lambda text: BOM + text,
    "CRLF": lambda text: text.replace(b"\n", b"\r\n"),
    "blank lines": lambda text: b"\n \n" + text.replace(b"\n", b"\n\n\t\n"),
    "all of them": lambda text: BOM + b"\r\n" + text.replace(b"\n", b"\r\n\r\n"),
    "no last newline": lambda text: text.rstrip(b"\n"),
    "a part with a BOM behind another": lambda text: BOM + text[: (at := text.index(b"\n") + 1)] + BOM + text[at:],
}


@pytest.mark.parametrize("how", REWRITTEN)
def test_a_log_that_an_editor_has_rewritten_is_read(how: str, log: Path) -> None:
    expected = load_history(write_log(log, rescued_run()))
    log.write_bytes(REWRITTEN[how](log.read_bytes()))
    assert load_history(log) == expected
    assert load_history(log.parent).skipped_lines == 0


def test_of_very_many_findings_the_first_and_the_newest_are_kept(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "EVENTS_KEPT", 5)
    measurements = [
        measurement(step, findings=(finding(LAYERS[0], step),), actions=(action(LAYERS[1], step),))
        for step in range(0, 60, 2)
    ]
    history = load_history(write_log(log, measurements))
    for kept in (history.findings, history.actions):
        assert [each.step for each in kept] == [0, 2, 4, 6, 8, 50, 52, 54, 56, 58]
    assert history.events_dropped == 2 * 20
    assert not any(each.findings or each.actions for each in history.measurements)
    text = Page(render_report(history)).text
    assert "40 findings and actions between the first and the newest are counted and not kept" in text


def test_memory_does_not_grow_with_the_findings_of_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "EVENTS_KEPT", 40)
    monkeypatch.setattr(history_module, "MEASUREMENTS_KEPT", 10)

    def peak(measurements: int) -> int:
        """Bytes at most in use while a log with 40 findings a measurement is read, shown, and compared."""
        path = tmp_path / f"{measurements}.jsonl"
        with path.open("wb") as file:
            file.write(encode_event(RunStartedEvent(timestamp_seconds=0.0, run="demo", data=run_info())))
            for step in range(measurements):
                found = tuple(finding(LAYERS[0], step, reason=f"{step} {k}: " + "x" * 500) for k in range(40))
                data = measurement(step, findings=found)
                file.write(encode_event(MeasurementEvent(timestamp_seconds=0.0, run="demo", data=data)))
        gc.collect()
        tracemalloc.start()
        try:
            history = load_history(path)
            render_report(history)
            render_comparison(history, load_history(path))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(20)  # templates and validators are built once
    small, large = peak(20), peak(160)
    assert large < 1.5 * small, (small, large)
