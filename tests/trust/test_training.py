"""A variant is trained on the data and weights of its run, and can run the batch just trained on again."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.trust import training
from benchmarks.trust.catalog import CATALOG
from benchmarks.trust.settings import TrustRun, monitor_config, thresholds_digest
from ess_monitor import Monitor, MonitorConfig


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
    results = {variant: training.train(run, variant) for variant in run.variants}
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


@pytest.mark.skipif(
    "replay" not in inspect.signature(Monitor.step).parameters, reason="Monitor.step does not take `replay` yet"
)
def test_a_run_is_trained_under_the_monitor_itself() -> None:
    result = training.train(shortened("copy: gla back 2"), "auto")
    assert result["findings"] == result["actions"] == []


def test_the_monitor_has_its_defaults() -> None:
    config = monitor_config("auto", {"metric": "accuracy", "metric_solved": 0.9})
    default = MonitorConfig()
    assert config.overhead_budget_ratio is None
    assert config.autopilot == type(default.autopilot)(mode="auto")
    assert (config.evidence, config.every_n_steps) == (default.evidence, default.every_n_steps)
    changed = {"metric", "metric_solved"}
    assert config.diagnosis.model_dump(exclude=changed) == default.diagnosis.model_dump(exclude=changed)
    assert monitor_config("control").autopilot.mode == monitor_config("remedy").autopilot.mode == "off"
