"""A layer that fails is turned off by itself; a lack of memory makes samples smaller; strict raises."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import time
from typing import Any

import pytest
import torch

import ess_monitor.pipeline.queue as measuring
from ess_monitor import Measurement, Monitor, MonitorConfig, PartError
from ess_monitor.capture.sampler import Sampler
from ess_monitor.featurizers import Backbone, BackboneConfig

FIRST, SECOND = "blocks.0.mixer", "blocks.1.mixer"
SETTINGS: dict[str, Any] = {
    "every_n_steps": 1,
    "overhead_budget_ratio": None,
    "runtime": {"queue_length": 64},
    # Armed by `sample` alone, so that each sample is judged before the next one is armed.
    "capture": {"source": "validation"},
}


class Collecting:
    name, inline = "collecting", True

    def __init__(self) -> None:
        self.measurements: list[Measurement] = []

    def start(self, run: Any, snapshot: Any) -> None:
        pass

    def export(self, measurement: Measurement) -> None:
        self.measurements.append(measurement)

    def close(self, status: str) -> None:
        pass

    def statuses(self, layer: str) -> list[str]:
        return [r.status for m in self.measurements for r in m.readings if r.layer == layer]


def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(vocab_size=16, width=16, featurizer="gla", state_size=8))


def config_with(**settings: Any) -> MonitorConfig:
    capture = {**SETTINGS["capture"], **settings.pop("capture", {})}
    return MonitorConfig.load(environment=False, **{**SETTINGS, **settings, "capture": capture})


def sampled(monitor: Monitor, steps: int) -> None:
    """Some steps, each of them sampled, and judged before the next."""
    for _ in range(steps):
        with monitor.sample():
            monitor.model(torch.arange(96).reshape(4, 24) % 16)
        monitor.step()
        monitor.flush()


def run(steps: int, sink: Collecting | None = None, **settings: Any) -> Monitor:
    with Monitor(backbone(), config_with(**settings), exporters=[] if sink is None else [sink]) as monitor:
        sampled(monitor, steps)
    return monitor


def fail_in_capture(patch: pytest.MonkeyPatch, layer: str, error: Exception, turns: Any = None) -> None:
    original = Sampler._take
    turns = itertools.repeat(True) if turns is None else iter(turns)

    def take(self: Sampler, one: Any, call: Any) -> Any:
        if one.name == layer and next(turns):
            raise error
        return original(self, one, call)

    patch.setattr(Sampler, "_take", take)


def fail_in_the_worker(patch: pytest.MonkeyPatch, layer: str, error: Exception) -> None:
    original = measuring.compute

    def compute(captured: Any, *args: Any) -> Any:
        if captured.layer.name == layer:
            raise error
        return original(captured, *args)

    patch.setattr(measuring, "compute", compute)


class TestOneLayer:
    @pytest.mark.parametrize("inject", [fail_in_capture, fail_in_the_worker])
    def test_that_fails_five_times_in_a_row_is_off_and_the_others_go_on(
        self, inject: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        inject(monkeypatch, SECOND, ValueError("boom"))
        sink = Collecting()
        with caplog.at_level(logging.WARNING, "ess_monitor"):
            monitor = run(9, sink)
        assert sink.statuses(FIRST) == ["ok"] * 9
        assert sink.statuses(SECOND) == ["failed"] * 5
        messages = [r.message for m in sink.measurements for r in m.readings if r.layer == SECOND]
        assert messages[:4] == ["ValueError: boom"] * 4
        assert messages[4] == (
            "off after 5 failures in a row: ValueError: boom; attach a new monitor to turn it on again"
        )
        said = [r.getMessage() for r in caplog.records if "is off for the rest of this run" in r.getMessage()]
        assert len(said) == 1
        assert said[0].startswith(f"ess_monitor: layer {SECOND} failed in 5 samples in a row")
        health = monitor.snapshot().health
        part = "capture" if inject is fail_in_capture else "measurement"
        assert health.layers_off == (SECOND,)
        assert health.parts_off == ()
        assert health.part_failures_total[part] == 5

    def test_that_fails_now_and_then_stays_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fail_in_capture(monkeypatch, SECOND, ValueError("boom"), itertools.cycle([True, True, True, False]))
        monitor = run(12)
        assert monitor.snapshot().health.layers_off == ()
        assert monitor.snapshot().health.part_failures_total["capture"] == 9

    def test_whose_place_is_gone_fails_alone(self) -> None:
        model, sink = backbone(), Collecting()
        with Monitor(model, config_with(), exporters=[sink]) as monitor:
            sampled(monitor, 1)
            del model.blocks[1].mixer.core
            model.blocks[1].mixer.forward = lambda x: x
            sampled(monitor, 3)
        assert sink.statuses(FIRST) == ["ok"] * 4
        assert sink.statuses(SECOND) == ["ok"] + ["failed"] * 3
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0

    def test_that_is_not_called_does_not_count_as_failing(self) -> None:
        model, sink = backbone(), Collecting()
        model.blocks[1].forward = lambda x: x
        with Monitor(model, config_with(), exporters=[sink]) as monitor:
            sampled(monitor, 8)
        assert sink.statuses(SECOND) == ["failed"] * 8
        assert monitor.snapshot().health.layers_off == ()


def test_all_layers_off_leave_the_rest_of_the_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "_take", lambda *args: 1 / 0)
    sink = Collecting()
    monitor = run(9, sink)
    assert [len(m.readings) for m in sink.measurements] == [2] * 5 + [0] * 4
    assert monitor.snapshot().measurements_total == {"ok": 0, "skipped": 4, "failed": 5}
    assert monitor.snapshot().health.layers_off == (FIRST, SECOND)


def test_a_resumed_run_tries_a_layer_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fail_in_capture(patch, SECOND, ValueError("boom"))
        state = run(6).state_dict()
    model, sink = backbone(), Collecting()
    monitor = Monitor(model, config_with(), exporters=[sink])
    monitor.load_state_dict(state)
    with monitor:
        sampled(monitor, 1)
    assert sink.statuses(SECOND) == ["ok"]


class TestMemory:
    @pytest.mark.parametrize("inject", [fail_in_capture, fail_in_the_worker])
    def test_samples_become_smaller_then_pause_and_no_layer_is_turned_off(
        self, inject: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inject(monkeypatch, SECOND, torch.OutOfMemoryError("no memory"))
        sink = Collecting()
        monitor = run(14, sink, capture={"samples": 4, "heads": 2})
        operators = [r.operators for m in sink.measurements for r in m.readings if r.layer == FIRST]
        assert operators == [8, 2, 1, 1], "samples x heads"
        snapshot = monitor.snapshot()
        assert snapshot.health.layers_off == ()
        assert snapshot.measurements_total["skipped"] == 10
        assert sum(snapshot.health.part_failures_total.values()) == 4

    def test_a_smaller_sample_that_fits_is_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = measuring.compute

        def compute(captured: Any, *args: Any) -> Any:
            if captured.operator.batch > 2:
                raise MemoryError
            return original(captured, *args)

        monkeypatch.setattr(measuring, "compute", compute)
        sink = Collecting()
        run(23, sink, capture={"samples": 4, "heads": 2})
        # Twenty good samples, then the whole is tried again.
        assert sink.statuses(FIRST) == ["failed"] + ["ok"] * 20 + ["failed", "ok"]


class TestStrict:
    @pytest.mark.parametrize(
        ("part", "target"),
        [
            ("capture", "ess_monitor.capture.sampler.part_of"),
            ("capture", "ess_monitor.runtime.Executor.submit"),
            ("measurement", "ess_monitor.pipeline.queue.compute"),
            ("measurement", "ess_monitor.pipeline.queue.reading"),
            ("worker", "ess_monitor.runtime.Executor.poll"),
            ("diagnosis", "ess_monitor.diagnosis.Tracker.observe"),
            ("intervention", "ess_monitor.interventions.Autopilot.act"),
            ("export", "ess_monitor.exporters.ExporterHub.export"),
        ],
    )
    def test_a_fault_of_any_part_is_raised_at_a_step(
        self, part: str, target: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def explode(*args: Any, **kwargs: Any) -> Any:
            raise ZeroDivisionError("injected")

        monkeypatch.setattr(target, explode)
        with pytest.raises(PartError, match="injected") as raised:
            run(4, strict=True)
        assert raised.value.part == part
        if target != "ess_monitor.pipeline.queue.reading":
            assert isinstance(raised.value.__cause__, ZeroDivisionError)

    def test_an_exporter_that_fails_is_raised_with_its_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def explode(*args: Any) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(Collecting, "export", explode)
        with pytest.raises(PartError, match="export: exporter 'collecting' failed: OSError: disk full"):
            run(4, Collecting(), strict=True)

    def test_a_fault_of_the_last_sample_is_raised_at_the_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fail_in_the_worker(monkeypatch, FIRST, ValueError("boom"))
        monitor = Monitor(backbone(), config_with(strict=True))
        monitor.start()
        with monitor.sample():
            monitor.model(torch.zeros(2, 8, dtype=torch.long))
        with pytest.raises(PartError, match="boom"):
            monitor.close()

    def test_an_error_of_the_loop_itself_is_not_hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fail_in_the_worker(monkeypatch, FIRST, ValueError("boom"))

        def loop() -> None:
            with Monitor(backbone(), config_with(strict=True)) as monitor:
                with monitor.sample():
                    monitor.model(torch.zeros(2, 8, dtype=torch.long))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            loop()

    def test_a_run_without_a_fault_raises_nothing(self) -> None:
        assert run(4, strict=True).snapshot().measurements_total["ok"] == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_that_goes_on_training_and_closes_the_monitor_waits_for_no_lock_of_the_parent() -> None:
    with Monitor(backbone(), config_with()) as monitor:
        sampled(monitor, 1)
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            with monitor._queue._executor._wake, monitor._context.counters._lock:
                held.set()
                release.wait(30)

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait(30)
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # a child that hangs is ended by it
            monitor.arm()
            monitor.step({"loss": 1.0})
            monitor.disarm()
            monitor.flush()
            monitor.close()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        release.set()
        thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_worker_that_is_off_gets_no_more_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any) -> Any:
        raise OSError("the worker's queue is gone")

    monkeypatch.setattr(measuring.MeasurementQueue, "poll", broken)
    settings = config_with(capture={"source": "train"})
    hooked = []
    with Monitor(backbone(), settings) as monitor:
        for _ in range(12):
            hooked.append(monitor.armed)
            monitor.model(torch.arange(96).reshape(4, 24) % 16).sum().backward()
            monitor.step()
        part = monitor.snapshot().health
        assert "worker" in part.parts_off
        assert part.part_failures_total["worker"] == 5, "what is off goes on failing"
    assert hooked[0]
    assert not hooked[-1]


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_a_worker_that_was_slow_in_many_samples_goes_on(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seconds = measuring.compute, 0.15

    def slow(*args: Any) -> Any:
        time.sleep(seconds)
        return original(*args)

    monkeypatch.setattr(measuring, "compute", slow)
    settings = config_with(
        capture={"source": "train"},
        runtime={"timeout_seconds": 0.05},
        every_n_steps=2,
        autopilot={"mode": mode, "lag_steps": 1},
    )
    sink = Collecting()
    with Monitor(backbone(), settings, exporters=[sink]) as monitor:

        def train_until(done: Any) -> None:
            deadline = time.monotonic() + 60
            while not done():
                assert time.monotonic() < deadline
                monitor.model(torch.arange(96).reshape(4, 24) % 16).sum().backward()
                monitor.step({"loss": 1.0})
                time.sleep(0.005)

        train_until(lambda: monitor.snapshot().health.part_failures_total["worker"] >= 6)
        assert monitor.snapshot().health.parts_off == ()
        assert {"timed_out"} <= {*sink.statuses(FIRST), *sink.statuses(SECOND)}
        seconds = 0.0
        train_until(lambda: sink.statuses(FIRST)[-1] == sink.statuses(SECOND)[-1] == "ok")


def test_a_worker_that_hangs_holds_a_run_in_lockstep_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(measuring, "compute", lambda *args: gate.wait(60) and {})
    settings = config_with(
        capture={"source": "train"},
        runtime={"timeout_seconds": 0.5},
        every_n_steps=2,
        autopilot={"mode": "auto", "lag_steps": 1},
    )
    waits = []
    with Monitor(backbone(), settings) as one:
        for _ in range(20):
            one.model(torch.arange(96).reshape(4, 24) % 16).sum().backward()
            started = time.monotonic()
            one.step({"loss": 1.0})
            waits.append(time.monotonic() - started)
        assert sum(wait > 0.4 for wait in waits) == 1
        assert one.snapshot().health.part_failures_total["worker"] == 1
        gate.set()


def test_close_and_flush_wait_no_longer_than_they_are_told_in_lockstep(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(measuring, "compute", lambda *args: gate.wait(60) and {})
    settings = config_with(
        capture={"source": "train"},
        runtime={"timeout_seconds": 60},
        every_n_steps=20,
        autopilot={"mode": "auto", "lag_steps": 9},
    )
    for end in (Monitor.close, Monitor.flush):
        monitor = Monitor(backbone(), settings)
        monitor.start()
        monitor.model(torch.arange(96).reshape(4, 24) % 16).sum().backward()
        monitor.step({"loss": 1.0})
        assert len(monitor._queue) == 1
        started = time.monotonic()
        end(monitor, timeout_seconds=0.1)
        assert time.monotonic() - started < 30
        monitor.close(timeout_seconds=0.1)
    gate.set()


def test_an_export_that_is_off_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def broken(self: Any, measurement: Any) -> None:
        tries.append(measurement.step)
        raise OSError("no sinks any more")

    monkeypatch.setattr("ess_monitor.exporters.hub.ExporterHub.export", broken)
    monitor = run(8)
    assert monitor.snapshot().health.parts_off == ("export",)
    assert len(tries) == 5
    assert monitor.snapshot().measurements_total["ok"] == 8
