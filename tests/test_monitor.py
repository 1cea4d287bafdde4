from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import ess_monitor.pipeline.queue as measuring
from ess_monitor import (
    CheckpointError,
    ConfigError,
    ExporterError,
    Measurement,
    Monitor,
    MonitorConfig,
    NoLayersError,
    RuntimeConfig,
)
from ess_monitor.featurizers import Backbone, BackboneConfig


class Collecting:
    """An exporter that keeps what it gets."""

    name, inline = "collecting", True

    def __init__(self) -> None:
        self.measurements: list[Measurement] = []
        self.run = None
        self.closed: list[str] = []

    def start(self, run, snapshot) -> None:
        self.run, self.snapshot = run, snapshot

    def export(self, measurement: Measurement) -> None:
        self.measurements.append(measurement)

    def close(self, status) -> None:
        self.closed.append(status)


def backbone(featurizer: str = "gla") -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(vocab_size=16, width=16, featurizer=featurizer, state_size=8))


def train(model: nn.Module, steps: int, monitor: Monitor | None = None, **step_options: object) -> list[float]:
    """A plain loop; the losses, bit by bit."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, 16, (4, 24), generator=generator)
        logits = model(tokens)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if monitor is not None:
            monitor.step({"loss": loss}, **step_options)
    return losses


# A queue that holds every sample: on a busy machine none may be dropped, where a test counts them.
CONFIG = MonitorConfig(every_n_steps=3, overhead_budget_ratio=None, runtime=RuntimeConfig(queue_length=64))


def monitored(steps: int = 12, config: MonitorConfig = CONFIG, featurizer: str = "gla", **options: object):
    model, sink = backbone(featurizer), Collecting()
    with Monitor(model, config, exporters=[sink], **options) as monitor:
        losses = []
        for _ in range(steps):
            pass
        losses = train(model, steps, monitor)
        monitor.flush()
    return model, sink, monitor, losses


class TestReadings:
    def test_every_n_steps_of_every_layer_from_initialization_on(self) -> None:
        _, sink, monitor, _ = monitored(10)
        assert [m.step for m in sink.measurements] == [0, 3, 6, 9]
        for measurement in sink.measurements:
            assert [r.layer for r in measurement.readings] == list(monitor.layers)
            assert {r.status for r in measurement.readings} == {"ok"}

    def test_a_reading_equals_an_svd_of_the_operator(self) -> None:
        model = backbone()
        tokens = torch.randint(0, 16, (4, 24))
        sink = Collecting()
        from ess_monitor import capture_operators

        with Monitor(model, CONFIG, exporters=[sink]) as monitor:
            with monitor.sample():
                model(tokens)
            (reading, *_) = monitor.flush()
        T = capture_operators(model, tokens)[reading.layer].materialize().double()
        counts = [(torch.linalg.svdvals(T[..., i:, :i]) > 1e-3).sum(-1).double() for i in reading.positions]
        expected = torch.stack(counts).mean()
        assert reading.effective_size == pytest.approx(float(expected), abs=1e-9)
        assert reading.utilization_ratio == pytest.approx(float(expected) / 8)
        assert reading.positions == (6, 12, 18)

    def test_the_certified_bounds_hold_the_mean_over_all_positions(self) -> None:
        model = backbone()
        tokens = torch.randint(0, 16, (4, 24))
        readings = {}
        for positions in (3, "all"):
            config = CONFIG.model_copy(update={"positions": positions})
            with Monitor(model, config) as monitor:
                with monitor.sample():
                    model(tokens)
                readings[positions] = monitor.flush()[0]
        between = readings["all"].per_position[5:18]  # positions 6 to 18
        assert readings[3].effective_size_lower <= sum(between) / len(between) <= readings[3].effective_size_upper
        assert readings[3].effective_size_lower <= readings[3].effective_size <= readings[3].effective_size_upper
        assert readings["all"].effective_size_lower == pytest.approx(readings["all"].effective_size_upper)

    def test_metrics_travel_with_their_step(self) -> None:
        _, sink, _, losses = monitored(8)
        assert [m.metrics["loss"] for m in sink.measurements] == pytest.approx([losses[s] for s in (0, 3, 6)])

    def test_softmax_attention_is_measured_against_a_growing_capacity(self) -> None:
        _, sink, _, _ = monitored(2, featurizer="sa")
        reading = sink.measurements[0].readings[0]
        assert reading.capacity_grows
        assert reading.state_capacity == pytest.approx(12.0)  # mean of the positions 6, 12, 18
        assert reading.retention_ratio is None

    def test_an_operator_with_nan_is_nonfinite_and_not_a_number(self) -> None:
        model, sink = backbone(), Collecting()
        with Monitor(model, CONFIG, exporters=[sink]) as monitor:
            with torch.no_grad():
                model.blocks[1].mixer.core.register_forward_pre_hook(
                    lambda m, args: (args[0] * float("nan"), *args[1:])
                )
            train(model, 2, monitor)
            monitor.flush()
            statuses = {r.layer: r.status for r in sink.measurements[0].readings}
            assert list(statuses.values()) == ["ok", "nonfinite"]
            assert sum(monitor.snapshot().nonfinite_total.values()) == 1

    def test_a_sequence_of_one_token_is_too_short(self) -> None:
        model = backbone()
        with Monitor(model, CONFIG) as monitor:
            with monitor.sample():
                model(torch.zeros(2, 1, dtype=torch.long))
            assert {r.status for r in monitor.flush()} == {"too_short"}

    def test_validation_batches_are_sampled_when_they_are_the_source(self) -> None:
        config = MonitorConfig.load(every_n_steps=3, overhead_budget_ratio=None, capture={"source": "validation"})
        model, sink = backbone(), Collecting()
        with Monitor(model, config, exporters=[sink]) as monitor:
            train(model, 4, monitor)
            assert sink.measurements == []
            assert monitor.sample_due
            model.eval()
            with torch.no_grad(), monitor.sample():
                model(torch.zeros(2, 16, dtype=torch.long))
            monitor.flush()
        assert [m.step for m in sink.measurements] == [4]


class TestTrainingIsSacred:
    @pytest.mark.parametrize("featurizer", ["gla", "s6", "sa"])
    def test_losses_and_parameters_are_bitwise_equal(self, featurizer: str) -> None:
        bare = backbone(featurizer)
        expected = train(bare, 12)
        model, _, _, losses = monitored(12, featurizer=featurizer)
        assert losses == expected
        for a, b in zip(model.parameters(), bare.parameters(), strict=True):
            assert torch.equal(a, b)

    FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {  # noqa: RUF012
        "capture": lambda m: m.setattr("ess_monitor.capture.sampler.part_of", _explode),
        "compute": lambda m: m.setattr(measuring, "compute", _explode),
        "assembling": lambda m: m.setattr("ess_monitor.pipeline.queue.reading", _explode),
        "diagnosis": lambda m: m.setattr("ess_monitor.diagnosis.Tracker.observe", _explode),
        "export": lambda m: m.setattr(Collecting, "export", _explode),
        "submit": lambda m: m.setattr("ess_monitor.runtime.Executor.submit", _explode),
        "poll": lambda m: m.setattr("ess_monitor.runtime.Executor.poll", _explode),
        "hub": lambda m: m.setattr("ess_monitor.exporters.ExporterHub.export", _explode),
        "metrics": lambda m: m.setattr("ess_monitor.runtime.MetricReader.read", _explode),
        "cadence": lambda m: m.setattr("ess_monitor.runtime.Cadence.sampled", _explode),
    }

    @pytest.mark.parametrize("part", sorted(FAULTS))
    def test_a_fault_in_any_part_changes_nothing_and_is_counted(
        self, part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        expected = train(backbone(), 12)
        self.FAULTS[part](monkeypatch)
        model, sink = backbone(), Collecting()
        with caplog.at_level(logging.WARNING), Monitor(model, CONFIG, exporters=[sink]) as monitor:
            losses = train(model, 12, monitor)
            snapshot = monitor.snapshot()
        assert losses == expected
        assert any("RuntimeError" in record.getMessage() for record in caplog.records)
        if part in ("capture", "compute", "assembling"):
            assert snapshot.measurements_total["failed"] > 0
        assert sum(len(m._forward_hooks) for m in model.modules()) == 0

    def test_a_part_that_keeps_failing_turns_itself_off(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(measuring, "compute", _explode)
        with caplog.at_level(logging.WARNING):
            monitored(40)
        assert sum("is off for the rest of this run" in r.getMessage() for r in caplog.records) == 1

    def test_no_thread_and_no_hook_stays_behind(self) -> None:
        before = set(threading.enumerate())
        model, *_ = monitored(6)
        assert set(threading.enumerate()) == before
        assert sum(len(m._forward_hooks) for m in model.modules()) == 0

    def test_random_numbers_are_not_drawn(self) -> None:
        model = backbone()
        with Monitor(model, CONFIG) as monitor:
            state = torch.get_rng_state()
            train(model, 6, monitor)
            monitor.flush()
        assert torch.equal(torch.get_rng_state(), state)


class TestMetrics:
    @pytest.mark.parametrize(
        "odd", [1j, 10**400, "high", torch.eye(2).to_sparse()], ids=["complex", "huge", "text", "sparse"]
    )
    def test_an_odd_metric_costs_nothing_else(self, odd: object, caplog: pytest.LogCaptureFixture) -> None:
        sink, metrics = Collecting(), {"odd": odd, 3: 1.0, "accuracy": np.float32(0.5), "loss": torch.tensor(2.0)}
        with Monitor(backbone(), CONFIG, exporters=[sink]) as monitor:
            with monitor.sample(metrics):
                monitor.model(torch.zeros(1, 16, dtype=torch.long))
            assert {r.status for r in monitor.flush()} == {"ok"}
        assert [m.metrics for m in sink.measurements] == [{"accuracy": 0.5, "loss": 2.0}]
        assert sum("is left out" in record.getMessage() for record in caplog.records) == 2


class TestLife:
    def test_a_queue_that_is_full_drops_the_sample_and_counts_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gate = threading.Event()
        original = measuring.compute
        monkeypatch.setattr(measuring, "compute", lambda *a: (gate.wait(20), original(*a))[1])
        model, sink = backbone(), Collecting()
        config = MonitorConfig.load(every_n_steps=1, overhead_budget_ratio=None, runtime={"queue_length": 1})
        with Monitor(model, config, exporters=[sink]) as monitor:
            train(model, 4, monitor)
            assert monitor.snapshot().measurements_total["skipped"] == 3
            gate.set()
            monitor.flush()
        assert [m.step for m in sink.measurements] == [0]

    def test_a_worker_that_hangs_gives_timed_out_readings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gate = threading.Event()
        monkeypatch.setattr(measuring, "compute", lambda *a: gate.wait(30) and {})
        config = MonitorConfig.load(every_n_steps=1, overhead_budget_ratio=None, runtime={"timeout_seconds": 0.05})
        model, sink = backbone(), Collecting()
        monitor = Monitor(model, config, exporters=[sink])
        monitor.start()
        train(model, 1, monitor)
        readings = monitor.flush(0.2)
        assert [r.status for r in readings] == ["timed_out", "deferred"]
        assert "runtime.timeout_seconds" in readings[0].message
        assert "given up" in readings[1].message
        gate.set()
        monitor.close()

    def test_the_overhead_budget_stretches_the_interval(self) -> None:
        config = MonitorConfig(every_n_steps=1, overhead_budget_ratio=1e-4)
        _, sink, monitor, _ = monitored(30, config)
        assert len(sink.measurements) <= 3
        assert monitor.snapshot().interval_steps > 30
        assert monitor.snapshot().overhead_ratio > 0

    def test_exporters_learn_of_the_run_and_of_its_end(self) -> None:
        _, sink, _, _ = monitored(3)
        assert sink.run.model == "Backbone"
        assert [layer.name for layer in sink.run.layers] == ["blocks.0.mixer", "blocks.1.mixer"]
        assert sink.run.overhead_budget_ratio == 1.0
        assert sink.closed == ["finished"]
        assert sink.snapshot().status == "finished"

    def test_an_exception_in_the_loop_marks_the_run_failed_and_passes_through(self) -> None:
        model, sink = backbone(), Collecting()
        monitor = Monitor(model, CONFIG, exporters=[sink])

        def loop() -> None:
            with monitor:
                train(model, 2, monitor)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            loop()
        assert sink.closed == ["failed"]

    def test_start_and_close_twice_are_harmless(self) -> None:
        sink = Collecting()
        monitor = Monitor(backbone(), CONFIG, exporters=[sink])
        monitor.start()
        monitor.start()
        monitor.close()
        monitor.close()
        assert sink.closed == ["finished"]
        monitor.step()

    def test_a_sink_that_cannot_start_is_an_error_at_the_start(self) -> None:
        class Dead(Collecting):
            def start(self, run, snapshot) -> None:
                raise ExporterError("no room")

        with pytest.raises(ExporterError, match="no room"):
            Monitor(backbone(), CONFIG, exporters=[Dead()]).start()

    def test_a_model_without_layers_is_an_error_at_once(self) -> None:
        with pytest.raises(NoLayersError):
            Monitor(nn.Linear(2, 2))

    def test_something_that_is_no_model_is_an_error(self) -> None:
        with pytest.raises(ConfigError, match="model"):
            Monitor("model")  # type: ignore[arg-type]


class TestResume:
    def test_steps_samples_and_conditions_go_on(self) -> None:
        config = MonitorConfig.load(
            every_n_steps=3,
            overhead_budget_ratio=None,
            runtime={"queue_length": 64},
            diagnosis={"warmup_steps": 0, "patience": 2},
        )
        model, whole = backbone(), Collecting()
        with Monitor(model, config, exporters=[whole]) as monitor:
            train(model, 20, monitor)
            monitor.flush()
        model, first, second = backbone(), Collecting(), Collecting()
        with Monitor(model, config, exporters=[first]) as monitor:
            train(model, 10, monitor)
            monitor.flush()
            state = copy.deepcopy(monitor.state_dict())
        with_state = Monitor(model, config, exporters=[second])
        with_state.load_state_dict(state)
        with with_state:
            train(model, 10, with_state)
            with_state.flush()
        assert [m.step for m in first.measurements + second.measurements] == [m.step for m in whole.measurements]
        assert second.measurements[-1].conditions == whole.measurements[-1].conditions

    @pytest.mark.parametrize("state", [{}, {"version": 99}, {"version": 1}, None, {"version": 1, "step": "x"}])
    def test_a_state_that_cannot_be_read_is_refused_with_a_reason(self, state: object) -> None:
        with pytest.raises(CheckpointError, match="state"):
            Monitor(backbone(), CONFIG).load_state_dict(state)  # type: ignore[arg-type]


def _explode(*args: object, **kwargs: object) -> None:
    raise RuntimeError("injected")
