from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ess_monitor import Monitor
from tests.faults import soak

SMALL = soak.Figures(step=0, resident_bytes=10**9, blocks=10**6, threads=3, file_handles=9, log_bytes=4000)
GOOD = soak.Report(SMALL, SMALL, SMALL, samples=10, measured=10, scrapes=1, seconds=1.0, unchanged=True)


@pytest.mark.parametrize(
    ("field", "more", "told"),
    [
        ("resident_bytes", 2**25, "resident_bytes grew by 33554432"),
        ("blocks", 2_001, "blocks grew by 2001"),
        ("threads", 1, "threads grew by 1"),
        ("file_handles", 1, "file_handles grew by 1"),
        ("log_bytes", 10**6, "a file of the log has 1004000 bytes"),
    ],
)
def test_growth_beyond_a_limit_is_told(field: str, more: int, told: str) -> None:
    assert GOOD.problems == []
    end = replace(SMALL, **{field: getattr(SMALL, field) + more})
    assert replace(GOOD, end=end).problems == [told]


def test_a_lost_sample_and_a_changed_training_are_told() -> None:
    assert replace(GOOD, measured=9, unchanged=False).problems == [
        "9 of 10 samples were measured",
        "the training was changed",
    ]


def test_growth_ends_the_command_with_an_error_and_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grown = replace(GOOD, end=replace(SMALL, threads=4))
    monkeypatch.setattr(soak, "run", lambda folder, steps: grown)
    assert soak.main(["--steps", "10", "--json", str(tmp_path / "figures.json")]) == 1
    assert "threads grew by 1" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text())["end"]["threads"] == 4
    monkeypatch.setattr(soak, "run", lambda folder, steps: GOOD)
    assert soak.main([]) == 0


def draws(monitor: Monitor, training: soak.Training) -> None:
    torch.rand(1)


def nudges(monitor: Monitor, training: soak.Training) -> None:
    with torch.no_grad():
        next(training.model.parameters()).view(-1)[0].mul_(1 + 2**-20)


def hooks(monitor: Monitor, training: soak.Training) -> None:
    training.model.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("meddling", [None, draws, nudges, hooks])
def test_a_monitor_that_meddles_with_the_training_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meddling: Callable[[Monitor, soak.Training], None] | None
) -> None:
    made: list[soak.Training] = []
    steps = itertools.count(1)
    start, step = soak.Training.__init__, Monitor.step

    def kept(training: soak.Training) -> None:
        start(training)
        made.append(training)

    def stepping(monitor: Monitor, *args: Any, **options: Any) -> None:
        step(monitor, *args, **options)
        if next(steps) == 30 and meddling is not None:
            meddling(monitor, made[0])

    monkeypatch.setattr(soak.Training, "__init__", kept)
    monkeypatch.setattr(Monitor, "step", stepping)
    assert soak.run(tmp_path, 60).unchanged is (meddling is None)


def test_the_soak_trains_the_regression_at_each_step_and_the_model_at_whole_ones() -> None:
    training = soak.Training()
    losses = [training.step(whole=True) for _ in range(50)]
    assert losses[-1] < losses[0] - 0.5
    before = soak.state_bytes(training.model)
    training.step(whole=False)
    assert soak.state_bytes(training.model) == before
    digest = training.digest()
    training.step(whole=False)
    assert training.digest() != digest
