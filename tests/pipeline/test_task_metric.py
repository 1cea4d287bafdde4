"""What a run says of a task metric that is set up wrongly."""

from __future__ import annotations

import html
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ess_monitor import Monitor, MonitorConfig
from ess_monitor.exporters import (
    EventLogConfig,
    EventLogExporter,
    Exporter,
    TerminalConfig,
    TerminalExporter,
    read_event_log,
)
from ess_monitor.featurizers import Backbone, BackboneConfig
from ess_monitor.report import load_history, render_report


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


def monitor(*exporters: Exporter, every_n_steps: int = 1, **diagnosis: Any) -> Monitor:
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(vocab_size=16, width=16, featurizer="gla", state_size=8))
    settings = {"metric_solved": 0.9, "warmup_steps": 0, "patience": 3, **diagnosis}
    cadence = {"every_n_steps": every_n_steps, "overhead_budget_ratio": None}
    return Monitor(model, MonitorConfig.load(environment=False, **cadence, diagnosis=settings), exporters=exporters)


def train(watched: Monitor, metrics: Mapping[str, Any] | None, times: int) -> None:
    """Every step is sampled."""
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


def test_what_is_wrong_with_the_metric_is_in_terminal_event_log_and_report(said: list[str], tmp_path: Path) -> None:
    screen: list[str] = []
    terminal = TerminalExporter(TerminalConfig(every_seconds=1000, width=400), write=screen.append)
    log = EventLogExporter(EventLogConfig(path=tmp_path / "log.jsonl"))
    watched = monitor(terminal, log, metric="val_loss_", metric_solved=0.1, patience=2)
    train(watched, {"val_loss": 0.5}, 6)
    watched.close()
    assert len(said) == 2
    shown = "\n".join(screen)
    measured = [
        m for event in read_event_log(tmp_path / "log.jsonl") if event.event == "measurement" for m in [event.data]
    ]
    assert [len(m.warnings) for m in measured] == [1, 1, 0, 0, 0, 0]
    page = html.unescape(render_report(load_history(tmp_path / "log.jsonl")))
    for message, words in zip(said, ("metric_mode='max'", "given were val_loss."), strict=True):
        text = message.removeprefix("ess_monitor: ")
        assert words in text
        assert shown.count(f"warning: {text}") == 1
        assert [text in m.warnings for m in measured].count(True) == 1
        assert page.count(text.removeprefix("diagnosis")) == 1


def test_a_run_too_short_for_the_warning_has_it_in_its_report(said: list[str], tmp_path: Path) -> None:
    watched = monitor(
        EventLogExporter(EventLogConfig(path=tmp_path / "log.jsonl")), metric="accuracy_", warmup_steps=100
    )
    train(watched, {"accuracy": 0.5}, 3)
    watched.close()
    assert said == []
    page = html.unescape(render_report(load_history(tmp_path / "log.jsonl")))
    assert "metric='accuracy_' was not among the metrics in 3 measurements; given were accuracy." in page


@pytest.mark.parametrize("value", [0.25, torch.tensor(0.25)])
def test_a_metric_that_comes_between_two_samples_counts_once(value: Any) -> None:
    """A tensor may be the same one at every step, and be written to."""
    watched = monitor(metric="accuracy", every_n_steps=4)
    watched.start()
    for step in range(12):
        watched.model(torch.randint(0, 16, (2, 24))).sum().backward()
        watched.step({"loss": 1.0, "accuracy": value} if step == 2 else {"loss": 1.0})
        if isinstance(value, torch.Tensor):
            value.fill_(step + 1.0 if step < 2 else 0.5)
        watched.flush()
    state = watched.state_dict()["diagnosis"]
    watched.close()
    assert state["task"]["new"] == [[2, 2.0 if isinstance(value, torch.Tensor) else 0.25]]
    assert state["metrics"] == [state["task"]["new"][0][1]] * 2


def test_a_metric_that_is_noted_after_the_last_step_of_an_epoch_goes_with_the_next_sample() -> None:
    watched = monitor(metric="accuracy", every_n_steps=4)
    watched.start()
    for step in range(12):
        watched.model(torch.randint(0, 16, (2, 24))).sum().backward()
        watched.step({"loss": 1.0})
        if step % 5 == 4:
            watched.note({"accuracy": step / 10, "f1": 0.5})
        watched.flush()
    state = watched.state_dict()["diagnosis"]
    watched.close()
    assert [value for _, value in state["task"]["new"]] == [0.4]


def test_names_that_come_between_samples_are_among_those_of_the_warning(said: list[str]) -> None:
    watched = monitor(metric="accuracy_", every_n_steps=2, patience=2)
    watched.start()
    for step in range(6):
        watched.model(torch.randint(0, 16, (2, 24))).sum().backward()
        watched.step({"loss": 1.0, "accuracy": 0.5} if step == 1 else {"loss": 1.0})
        watched.flush()
    watched.close()
    assert "given were accuracy, loss." in said[0]
