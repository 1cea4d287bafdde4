"""The hub: fan-out that cannot hurt the training, whatever a sink does."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable

import pytest

from ess_monitor.errors import ConfigError, ExporterError
from ess_monitor.exporters import ExporterHub
from ess_monitor.records import Measurement, RunInfo, Snapshot
from tests.exporters.helpers import RecordingExporter, measurement, run_info, snapshot, threads_of_ours


def _raise(error: BaseException) -> Callable[[Measurement], None]:
    def on_export(measurement: Measurement) -> None:
        raise error

    return on_export


class _CannotStart(RecordingExporter):
    def __init__(self, error: BaseException) -> None:
        super().__init__("broken")
        self.error = error

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        raise self.error


class _CannotClose(RecordingExporter):
    def close(self, status: str) -> None:
        raise OSError("disk gone")


def _started(*exporters: RecordingExporter, **settings: int) -> ExporterHub:
    hub = ExporterHub(exporters, **settings)
    hub.start(run_info(), lambda: snapshot())
    return hub


def test_every_exporter_gets_every_measurement_in_order() -> None:
    queued, inline = RecordingExporter("queued"), RecordingExporter("inline", inline=True)
    hub = _started(queued, inline)
    for step in range(50):
        hub.export(measurement(step))
    assert inline.steps == list(range(50)), "an inline exporter is served at once"
    hub.close("finished", timeout_seconds=30)
    assert queued.steps == list(range(50)), "closing drains the queue"
    assert queued.calls[0] == inline.calls[0] == "start"
    assert queued.calls[-1] == inline.calls[-1] == "close finished"


def test_inline_exporters_run_on_the_training_thread_and_others_on_their_own() -> None:
    exporters = [RecordingExporter("a"), RecordingExporter("b"), RecordingExporter("c", inline=True)]
    hub = _started(*exporters)
    hub.export(measurement())
    hub.close("finished", timeout_seconds=30)
    here = threading.current_thread().name
    assert [exporter.threads for exporter in exporters] == [{"ess-monitor-export-a"}, {"ess-monitor-export-b"}, {here}]


def test_counts_of_every_exporter_exist_at_zero_before_the_start() -> None:
    hub = ExporterHub([RecordingExporter("a"), RecordingExporter("b", inline=True)])
    assert hub.errors == hub.dropped == hub.queue_lengths == {"a": 0, "b": 0}


def test_equal_names_are_told_apart() -> None:
    hub = ExporterHub([RecordingExporter("log"), RecordingExporter("log"), RecordingExporter("log-2")])
    assert list(hub.errors) == ["log", "log-3", "log-2"]


@pytest.mark.parametrize("error", [ExporterError("port 1 is taken; set port=0"), OSError("no such device")])
def test_one_that_cannot_start_closes_the_others_and_is_named(error: Exception) -> None:
    first, last = RecordingExporter("first"), RecordingExporter("last")
    hub = ExporterHub([first, _CannotStart(error), last])
    threads = threads_of_ours()
    with pytest.raises(ExporterError, match=f"exporter 'broken' cannot start.*{error}"):
        hub.start(run_info(), lambda: snapshot())
    assert first.calls == ["start", "close failed"]
    assert last.calls == []
    assert threads_of_ours() == threads
    hub.export(measurement())
    hub.close("failed")
    assert first.calls == ["start", "close failed"]


def test_an_interrupt_during_the_start_closes_what_is_open_and_goes_through() -> None:
    first = RecordingExporter("first")
    hub = ExporterHub([first, _CannotStart(KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        hub.start(run_info(), lambda: snapshot())
    assert first.calls == ["start", "close failed"]


def test_a_hub_starts_once() -> None:
    hub = _started()
    with pytest.raises(ExporterError, match="already been started"):
        hub.start(run_info(), lambda: snapshot())


@pytest.mark.parametrize("argument", ["queue_length", "max_consecutive_errors"])
def test_a_number_below_one_is_refused(argument: str) -> None:
    with pytest.raises(ConfigError, match=f"{argument}=0 must be a whole number from 1"):
        ExporterHub((), **{argument: 0})


@pytest.mark.parametrize("inline", [True, False])
def test_an_exploding_exporter_is_counted_logged_once_and_turned_off(
    inline: bool, caplog: pytest.LogCaptureFixture
) -> None:
    broken = RecordingExporter("broken", inline=inline, on_export=_raise(OSError("disk full")))
    sound = RecordingExporter("sound")
    hub = _started(broken, sound, max_consecutive_errors=5)
    with caplog.at_level(logging.WARNING, "ess_monitor.exporters"):
        for step in range(12):
            hub.export(measurement(step))
        hub.close("finished", timeout_seconds=30)
    assert hub.errors == {"broken": 5, "sound": 0}
    assert hub.dropped == {"broken": 7, "sound": 0}
    assert sound.steps == list(range(12))
    assert broken.calls[-1] == "close finished", "what is turned off is still closed"
    first, off = (record.getMessage() for record in caplog.records)
    assert "'broken' failed" in first
    assert "OSError: disk full" in first
    assert "'broken' is off" in off
    assert "it failed 5 times in a row" in off
    assert "restart the run" in off


def test_a_success_in_between_keeps_an_exporter_on() -> None:
    def every_second(measurement: Measurement) -> None:
        if measurement.step % 2:
            raise ValueError(measurement.step)

    flaky = RecordingExporter("flaky", inline=True, on_export=every_second)
    hub = _started(flaky, max_consecutive_errors=2)
    for step in range(20):
        hub.export(measurement(step))
    hub.close("finished")
    assert hub.errors == {"flaky": 10}
    assert hub.dropped == {"flaky": 0}


def test_an_exporter_that_exits_only_ends_its_own_measurement() -> None:
    def exit_first(measurement: Measurement) -> None:
        if measurement.step == 0:
            sys.exit("a sink must not do this")

    exporter = RecordingExporter("exits", on_export=exit_first)
    hub = _started(exporter)
    for step in range(3):
        hub.export(measurement(step))
    hub.close("finished", timeout_seconds=30)
    assert exporter.steps == [1, 2]
    assert hub.errors == {"exits": 1}


def test_an_interrupt_on_the_training_thread_goes_through() -> None:
    hub = _started(RecordingExporter("inline", inline=True, on_export=_raise(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        hub.export(measurement())
    hub.close("failed")


def test_an_error_without_a_text_is_still_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    hub = _started(RecordingExporter("mute", inline=True, on_export=_raise(Mute())))
    with caplog.at_level(logging.WARNING, "ess_monitor.exporters"):
        hub.export(measurement())
    hub.close("finished")
    assert "'mute' failed (Mute)" in caplog.text


def test_a_hanging_exporter_fills_its_queue_drops_the_newest_and_blocks_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    busy, release = threading.Event(), threading.Event()

    def hang(measurement: Measurement) -> None:
        busy.set()
        release.wait()

    received = threading.Semaphore(0)
    stuck = RecordingExporter("stuck", on_export=hang)
    sound = RecordingExporter("sound", on_export=lambda measurement: received.release())
    hub = _started(stuck, sound, queue_length=4)
    hub.export(measurement(0))
    assert busy.wait(30)
    assert received.acquire(timeout=30)
    with caplog.at_level(logging.WARNING, "ess_monitor.exporters"):
        for step in range(1, 11):
            hub.export(measurement(step))
            assert received.acquire(timeout=30), "the sound one is served while the other hangs"
    assert hub.queue_lengths["stuck"] == 4
    assert hub.dropped["stuck"] == 6
    assert hub.errors == {"stuck": 0, "sound": 0}
    assert caplog.text.count("its queue of 4 is full") == 1
    release.set()
    hub.close("finished", timeout_seconds=30)
    assert stuck.steps == [0, 1, 2, 3, 4], "the newest were dropped, the oldest kept"
    assert sound.steps == list(range(11))


def test_closing_gives_up_on_a_hanging_exporter_and_closes_the_others(caplog: pytest.LogCaptureFixture) -> None:
    busy, release = threading.Event(), threading.Event()

    def hang(measurement: Measurement) -> None:
        busy.set()
        release.wait()

    stuck, sound = RecordingExporter("stuck", on_export=hang), RecordingExporter("sound")
    others = set(threads_of_ours())
    hub = _started(stuck, sound)
    for step in range(4):
        hub.export(measurement(step))
    assert busy.wait(30)
    with caplog.at_level(logging.WARNING, "ess_monitor.exporters"):
        hub.close("finished", timeout_seconds=0.2)
    assert sound.calls[-1] == "close finished"
    assert hub.dropped["stuck"] == 3
    assert "'stuck' did not close within 0.2 s" in caplog.text
    release.set()
    for thread in set(threads_of_ours()) - others:
        thread.join(30)
    assert stuck.calls == ["start", "export", "close finished"], "it is closed as soon as it comes back"


def test_close_twice_closes_once() -> None:
    exporter = RecordingExporter()
    hub = _started(exporter)
    hub.close("finished", timeout_seconds=30)
    hub.close("failed")
    assert exporter.calls == ["start", "close finished"]


def test_an_inline_exporter_that_is_being_called_is_closed_when_the_call_returns() -> None:
    def interrupted(measurement: Measurement) -> None:
        hub.export(measurement)  # as a signal handler would
        hub.close("failed", timeout_seconds=30)
        inline.calls.append("return")

    inline, queued = RecordingExporter("inline", inline=True, on_export=interrupted), RecordingExporter("queued")
    hub = _started(inline, queued)
    hub.export(measurement(3))
    assert inline.calls == ["start", "export", "return", "close failed"]
    assert queued.calls[-1] == "close failed"
    assert hub.dropped["inline"] == 1


def test_a_measurement_after_the_end_is_ignored() -> None:
    exporter = RecordingExporter("inline", inline=True)
    hub = _started(exporter)
    hub.close("finished")
    hub.export(measurement())
    assert exporter.steps == []


@pytest.mark.parametrize("inline", [True, False])
def test_an_exporter_that_cannot_close_is_counted_and_logged(inline: bool, caplog: pytest.LogCaptureFixture) -> None:
    hub = _started(_CannotClose("sticky", inline=inline))
    with caplog.at_level(logging.WARNING, "ess_monitor.exporters"):
        hub.close("finished", timeout_seconds=30)
    assert hub.errors == {"sticky": 1}
    assert "'sticky' did not close cleanly: OSError: disk gone" in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_neither_exports_nor_closes_nor_hangs() -> None:
    queued, inline = RecordingExporter("queued"), RecordingExporter("inline", inline=True)
    hub = _started(queued, inline)
    child = os.fork()
    if child == 0:
        hub.export(measurement())
        hub.close("failed")
        os._exit(0 if inline.calls == ["start"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    hub.export(measurement(7))
    hub.close("finished", timeout_seconds=30)
    assert queued.steps == inline.steps == [7]


def test_a_log_handler_that_raises_keeps_no_sink_from_its_measurements_and_its_end() -> None:
    class Refuses(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("no log")

    refuses = Refuses()
    sink = RecordingExporter("sink", on_export=_raise(ValueError("no")))
    logger = logging.getLogger("ess_monitor")
    logger.addHandler(refuses)
    try:
        hub = _started(sink)
        for step in range(3):
            hub.export(measurement(step))
        hub.close("finished", timeout_seconds=30)
    finally:
        logger.removeHandler(refuses)
    assert (hub.errors, hub.queue_lengths) == ({"sink": 3}, {"sink": 0})
    assert sink.calls[-1] == "close finished"
    assert isinstance(hub.take_errors()["sink"], ValueError)


def test_a_failed_export_keeps_nothing_of_the_training_alive() -> None:
    alive: list[weakref.ref[Measurement]] = []
    hub = _started(RecordingExporter("sink", inline=True, on_export=_raise(ValueError("no"))), max_consecutive_errors=9)
    gc.collect()
    gc.disable()
    try:
        for step in range(4):
            given = measurement(step)
            alive.append(weakref.ref(given))
            hub.export(given)
            del given
        assert [each() for each in alive] == [None] * 4
    finally:
        gc.enable()
    hub.close("finished")


# -- where the output is ----------------------------------------------------------------------------------------------


class _Shown(RecordingExporter):
    shown_by = "curves: runs; see them with: tensorboard --logdir runs"


class _Concludes(RecordingExporter):
    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("terminal")
        self.error = error
        self.lines: tuple[str, ...] = ()

    def conclude(self, lines: tuple[str, ...]) -> None:
        self.lines, self.calls = lines, [*self.calls, "conclude"]
        if self.error is not None:
            raise self.error


def test_once_all_are_closed_those_that_ask_are_told_where_the_output_is() -> None:
    terminal = _Concludes()
    hub = _started(terminal, _Shown(), RecordingExporter("silent"))
    hub.export(measurement(1))
    hub.close("finished", timeout_seconds=30)
    hub.close("finished", timeout_seconds=30)
    assert terminal.lines == (_Shown.shown_by,)
    assert terminal.calls == ["start", "export", "close finished", "conclude"]


def test_without_output_nothing_is_said() -> None:
    terminal = _Concludes()
    _started(terminal, RecordingExporter()).close("finished", timeout_seconds=30)
    assert "conclude" not in terminal.calls


def test_one_that_cannot_say_it_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    _started(_Concludes(OSError("terminal gone")), _Shown()).close("finished", timeout_seconds=30)
    assert "'terminal' could not say where the output is: OSError: terminal gone" in caplog.text
