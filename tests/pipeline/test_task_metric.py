"""What a run says of a task metric that is set up wrongly."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from ess_monitor import Monitor, MonitorConfig
from ess_monitor.featurizers import Backbone, BackboneConfig


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Warnings about the metric, in a list that grows with them."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ess_monitor")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def monitor(**diagnosis: Any) -> Monitor:
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(vocab_size=16, width=16, featurizer="gla", state_size=8))
    settings = {"metric_solved": 0.9, "warmup_steps": 0, "patience": 3, **diagnosis}
    return Monitor(
        model, MonitorConfig.load(environment=False, every_n_steps=1, overhead_budget_ratio=None, diagnosis=settings)
    )


def train(watched: Monitor, metrics: Mapping[str, Any] | None, times: int) -> None:
    watched.start()
    for _ in range(times):
        watched.model(torch.randint(0, 16, (2, 24))).sum().backward()
        watched.step(metrics)
        watched.flush()


def test_a_mode_that_contradicts_the_metric_is_said_once_when_the_monitor_is_built(said: list[str]) -> None:
    watched = monitor(metric="val_loss")
    [message] = said
    assert 'set metric_mode="min"' in message
    train(watched, {"val_loss": 3.0}, 4)
    watched.close()
    assert said == [message]
    monitor(metric="val_loss", metric_mode="min").close()
    assert said == [message]


def test_a_metric_that_is_never_given_is_said_once_with_the_names_that_are(said: list[str]) -> None:
    watched = monitor(metric="accuracy_")
    train(watched, {"loss": torch.tensor(1.0), "accuracy": 0.95}, 2)
    assert said == []
    train(watched, {"loss": torch.tensor(1.0), "accuracy": 0.95}, 6)
    watched.close()
    [message] = said
    assert "metric='accuracy_'" in message
    assert "accuracy, loss" in message


def test_of_many_names_twenty_are_listed(said: list[str]) -> None:
    watched = monitor(metric="accuracy_")
    train(watched, {f"metric_{k:02d}": 0.5 for k in reversed(range(30))}, 3)
    watched.close()
    [message] = said
    assert "metric_00, metric_01" in message
    assert "metric_19 and 10 more" in message
    assert "metric_20" not in message


def test_nothing_is_said_before_the_warm_up_is_over_or_while_no_metrics_are_given(said: list[str]) -> None:
    early, without = monitor(metric="accuracy_", warmup_steps=100), monitor(metric="accuracy_")
    train(early, {"loss": 1.0}, 8)
    train(without, None, 8)
    early.close()
    without.close()
    assert said == []


def test_a_loop_that_never_gives_metrics_is_told_in_the_end(said: list[str]) -> None:
    watched = monitor(metric="accuracy", metric_constant_after=10)
    train(watched, None, 12)
    watched.close()
    [message] = said
    assert "was given no metrics" in message


@pytest.mark.parametrize("value", [0.1, math.nan, torch.tensor(math.inf)])
def test_a_metric_that_was_given_once_is_not_missed(value: Any, said: list[str]) -> None:
    watched = monitor(metric="accuracy")
    train(watched, {"accuracy": value}, 1)
    train(watched, {"loss": 1.0}, 8)
    watched.close()
    assert said == []


def test_a_metric_that_was_given_before_the_resume_is_not_missed(said: list[str]) -> None:
    first, second = monitor(metric="accuracy"), monitor(metric="accuracy")
    train(first, {"accuracy": 0.1}, 2)
    second.load_state_dict(first.state_dict())
    train(second, {"loss": 1.0}, 8)
    first.close()
    second.close()
    assert said == []
    other = monitor(metric="accuracy_")
    other.load_state_dict(first.state_dict())
    train(other, {"loss": 1.0}, 8)
    other.close()
    assert len(said) == 1


def test_a_run_without_a_metric_is_told_nothing(said: list[str]) -> None:
    watched = monitor(metric_solved=None)
    train(watched, {"loss": 1.0}, 8)
    watched.close()
    assert said == []
