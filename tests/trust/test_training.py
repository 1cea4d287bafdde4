"""A variant is trained on the data and weights of its run, and can run the batch just trained on again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.trust import training
from benchmarks.trust.catalog import CATALOG
from benchmarks.trust.settings import VARIANTS, TrustRun, monitor_config, thresholds_digest
from ess_monitor import Monitor, MonitorConfig
from ess_monitor.diagnosis import DiagnosisConfig
from ess_monitor.records import Measurement, Reading


def shortened(name: str, **changes: Any) -> TrustRun:
    """Return a run of the catalog with 12 steps."""
    run = next(run for run in CATALOG if run.name.startswith(name))
    return dataclasses.replace(run, setting=dataclasses.replace(run.setting, steps=12, **changes))


class ReplayingMonitor(Monitor):
    """Runs every batch again, twice."""

    replayed: list[tuple[float, float, float]]

    def step(self, metrics: Any = None, *, replay: Callable[[], Any] | None = None, **given: Any) -> None:  # type: ignore[override]
        super().step(metrics, **given)
        assert replay is not None
        with torch.no_grad():
            self.replayed.append((float(replay()), float(replay()), float(metrics["loss"])))


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float, float]]:
    ReplayingMonitor.replayed = []
    monkeypatch.setattr(training, "Monitor", ReplayingMonitor)
    return ReplayingMonitor.replayed


def test_all_variants_but_the_repeat_have_the_same_data_and_weights(replayed: list[Any]) -> None:
    run = shortened("copy: wla back 1")
    results = {variant: training.train(run, variant) for variant in VARIANTS}
    starts = {variant: result["start"] for variant, result in results.items()}
    assert starts["control"] == starts["auto"] == starts["auto_metric"] == starts["remedy"] != starts["repeat"]
    losses = {variant: result["loss"] for variant, result in results.items()}
    assert losses["control"] == losses["auto"] == losses["auto_metric"] != losses["repeat"]


def test_the_batch_just_trained_on_is_run_again(replayed: list[tuple[float, float, float]]) -> None:
    training.train(shortened("copy: wla back 1", learning_rate=1e-4), "auto")
    assert len(replayed) == 12
    for first, second, trained in replayed:
        assert first == second
        assert first != trained, "the parameters have been updated since"
        assert first == pytest.approx(trained, rel=0.01)


def test_a_result_is_plain_and_complete(replayed: list[Any]) -> None:
    run = shortened("fine_tuning: gla markov", pretrained_steps=4)
    result = training.train(run, "auto_metric")
    assert json.loads(json.dumps(result)) == result
    assert (result["name"], result["variant"], result["settings"]) == (run.name, "auto_metric", run.digest)
    assert result["thresholds"] == thresholds_digest()
    assert result["target"]["metric"] == "loss"
    assert len(result["evaluations"]) == len(training.evaluation_steps(12))
    assert result["loss"] == pytest.approx(sum(e[1] for e in result["evaluations"]) / len(result["evaluations"]))


def test_the_task_changes_during_a_curriculum(replayed: list[tuple[float, float, float]]) -> None:
    training.train(shortened("curriculum: gla recall", first_steps=6), "control")
    assert len(replayed) == 12


def test_a_run_is_trained_under_the_monitor_itself_and_stands_for_its_control() -> None:
    run = shortened("copy: gla back 2")
    results = {variant: training.train(run, variant) for variant in ("auto", "auto_metric", "control")}
    assert results["auto"]["findings"] == results["auto"]["actions"] == []
    assert {variant: result["stands_for"] for variant, result in results.items()} == {
        "auto": ["control", "auto_metric"],
        "auto_metric": ["control"],
        "control": [],
    }
    assert len({result["loss"] for result in results.values()}) == 1


@pytest.mark.parametrize(("accuracy", "proposes"), [(0.95, False), (0.2, True)])
def test_the_second_diagnosis_sees_what_the_metric_would_change(accuracy: float, proposes: bool) -> None:
    """A layer with low use whose decay is not to blame is suspected only where a task stands still."""
    low = {"status": "ok", "length": 64, "positions": (32,), "state_capacity": 16, "attainable_size": 16}
    second = training.SecondDiagnosis(DiagnosisConfig(metric="accuracy", metric_solved=0.9))
    second.start(None, None)
    for step in range(0, 2400, 100):
        readings = [
            Reading(step=step, layer=layer, **low, effective_size=1.6, utilization_ratio=0.1, retention_ratio=0.9)
            for layer in ("blocks.0", "blocks.1")
        ]
        metrics = {"accuracy": accuracy + 1e-6 * step}
        second.export(Measurement(step=step, timestamp_seconds=0.0, metrics=metrics, readings=readings, conditions={}))
    second.close("completed")
    assert second.proposes == proposes


def test_the_monitor_has_its_defaults() -> None:
    config = monitor_config("auto", {"metric": "accuracy", "metric_solved": 0.9})
    default = MonitorConfig()
    assert config.overhead_budget_ratio is None
    assert config.autopilot == type(default.autopilot)(mode="auto")
    assert (config.evidence, config.every_n_steps) == (default.evidence, default.every_n_steps)
    changed = {"metric", "metric_solved"}
    assert config.diagnosis.model_dump(exclude=changed) == default.diagnosis.model_dump(exclude=changed)
    assert monitor_config("control").autopilot.mode == monitor_config("remedy").autopilot.mode == "off"
