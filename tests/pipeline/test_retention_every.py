"""Retention measured in some samples only: against the last size without decay, which is remembered with its step."""

from __future__ import annotations

import json
from collections import OrderedDict
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from ess_monitor import ConfigError, Monitor, MonitorConfig, capture_operators
from ess_monitor.errors import CheckpointError
from ess_monitor.ess import tolerance_ess
from ess_monitor.ess.cost import SampleShape
from ess_monitor.featurizers import build_mixer
from ess_monitor.pipeline.readings import compute
from ess_monitor.records import Reading
from tests.pipeline.test_turns import Collecting

EVERY = 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(build_mixer("gla", 16, 2, 8), build_mixer("sa", 16, 2, 8))


def config(every: int = EVERY, **settings: Any) -> MonitorConfig:
    settings = {"capture": {"samples": 2, "heads": 2}, **settings}
    return MonitorConfig.load(
        environment=False,
        every_n_steps=1,
        overhead_budget_ratio=None,
        retention_every_n_samples=every,
        positions="midpoint",
        **settings,
    )


def run(monitor: Monitor, steps: range) -> list[nn.Module]:
    """Train on a batch of its own at each step; return the models as they were sampled."""
    optimizer, seen = torch.optim.SGD(monitor.model.parameters(), lr=1.0), []
    for step in steps:
        seen.append(deepcopy(monitor.model))
        optimizer.zero_grad()
        monitor.model(batch(step)).square().mean().backward()
        optimizer.step()
        monitor.step()
        monitor.flush()
    return seen


def batch(step: int) -> torch.Tensor:
    return torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(step))


def sizes(model: nn.Module, step: int) -> tuple[float, float]:
    """Mean ESS of the first layer, and that with A := I, by an SVD of T."""
    operator = capture_operators(model, batch(step))["0"]
    undecayed = operator.without_decay()
    assert undecayed is not None
    found = []
    for each in (operator, undecayed):
        values = torch.linalg.svdvals(each.materialize().double()[..., 20:, :20])
        found.append(float(tolerance_ess(values).mean()))
    return found[0], found[1]


def of(sink: Collecting, layer: str) -> list[Reading]:
    return [reading for reading in sink.readings if reading.layer == layer]


def test_between_the_retention_is_that_of_the_present_size_against_the_last_one_without_decay() -> None:
    sink, steps = Collecting(), range(8)
    with Monitor(net(), config(), exporters=[sink]) as monitor:
        models = run(monitor, steps)
    readings = of(sink, "0")
    assert [reading.retention_step for reading in readings] == [None, 0, 0, None, 3, 3, None, 6]
    for step, reading in zip(steps, readings, strict=True):
        size, _ = sizes(models[step], step)
        last = step if reading.retention_step is None else reading.retention_step
        assert reading.effective_size == pytest.approx(size)
        assert reading.retention_ratio == pytest.approx(size / sizes(models[last], last)[1])
    assert {(r.retention_ratio, r.retention_step) for r in of(sink, "1")} == {(None, None)}, "attention has no decay"


def test_nothing_else_depends_on_it() -> None:
    found = []
    for every in (1, EVERY):
        sink = Collecting()
        with Monitor(net(), config(every), exporters=[sink]) as monitor:
            run(monitor, range(4))
        found.append([r.model_copy(update={"retention_ratio": None, "retention_step": None}) for r in sink.readings])
    assert found[0] == found[1]


def test_a_layer_on_which_something_is_to_be_decided_is_measured_each_time() -> None:
    sink = Collecting()
    with Monitor(net(), config(100), exporters=[sink]) as monitor:
        run(monitor, range(2))
        monitor._context.turns.prefer(["0"])
        monitor._results._prefer = lambda: None  # type: ignore[method-assign]
        run(monitor, range(2, 4))
    assert [reading.retention_step for reading in of(sink, "0")] == [None, 0, None, None]


def test_a_size_that_was_lost_is_measured_in_the_next_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = Collecting()

    def failing(captured: Any, *args: Any, **options: Any) -> Any:
        if fails:
            raise RuntimeError("lost")
        return compute(captured, *args, **options)

    monkeypatch.setattr("ess_monitor.pipeline.queue.compute", failing)
    with Monitor(net(), config(), exporters=[sink]) as monitor:
        for step, fails in enumerate([False, True, False, True, False, False]):  # noqa: B007
            run(monitor, range(step, step + 1))
    found = [(reading.status, reading.retention_step) for reading in of(sink, "0")]
    assert found == [("ok", None), ("failed", None), ("ok", 0), ("failed", None), ("ok", None), ("ok", 4)]


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_resumed_run_goes_on_as_one_that_did_not_stop(stop: int) -> None:
    whole = Collecting()
    with Monitor(net(), config(), exporters=[whole]) as monitor:
        run(monitor, range(8))
    first, second = Collecting(), Collecting()
    with Monitor(net(), config(), exporters=[first]) as monitor:
        run(monitor, range(stop))
        model, state = monitor.model, json.loads(json.dumps(monitor.state_dict()))
    wrapped = nn.Sequential(OrderedDict(model=model))  # its layers have other names
    with Monitor(wrapped, config(), exporters=[second]) as monitor:
        monitor.load_state_dict(state)
        run(monitor, range(stop, 8))
    later = [reading.model_copy(update={"layer": "0"}) for reading in of(second, "model.0")]
    assert of(first, "0") + later == of(whole, "0")


def test_a_state_from_before_goes_on_and_a_damaged_one_is_refused() -> None:
    with Monitor(net(), config()) as monitor:
        run(monitor, range(2))
        state = monitor.state_dict()
    assert state["undecayed"]["ages"] == {"0": 1}
    old = {name: value for name, value in state.items() if name != "undecayed"}
    sink = Collecting()
    with Monitor(net(), config(), exporters=[sink]) as monitor:
        monitor.load_state_dict(old)
        run(monitor, range(2, 4))
    assert [reading.retention_step for reading in of(sink, "0")] == [None, 2]
    for damage in ({"last": {"0": [1]}}, {"last": {"0": [1, -2.0]}}, {"ages": {"0": -1}}, {"ages": {"0": "x"}}, 3):
        with Monitor(net(), config()) as monitor, pytest.raises(CheckpointError, match="undecayed"):
            monitor.load_state_dict({**state, "undecayed": damage})


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "often"])
def test_a_number_of_samples_that_makes_no_sense_is_named(wrong: object) -> None:
    with pytest.raises(ConfigError, match="retention_every_n_samples"):
        config(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("operator", ["DiagonalRecurrence", "DeltaRecurrence", "SoftmaxAttention"])
def test_the_estimate_is_lower_without(operator: str) -> None:
    whole = SampleShape(operator, state=64, samples=4, heads=4, length=1024, positions=3)
    without = replace(whole, with_retention=False)
    assert (without.seconds < whole.seconds) == (operator != "SoftmaxAttention")
    assert without.seconds > 0.5 * whole.seconds
