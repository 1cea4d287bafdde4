"""A sampled step of a compiled model runs eagerly: what it takes longer is the monitor's cost."""

from __future__ import annotations

import pytest
import torch

from ess_monitor import Monitor, MonitorConfig
from ess_monitor.capture.hooks.compiler import has_compiled
from ess_monitor.featurizers import GLA
from ess_monitor.pipeline import sampling


def cost_of_capture(monkeypatch: pytest.MonkeyPatch, *, compiled: bool) -> tuple[float, int]:
    """Train with steps of 1 s, and of 5 s where sampled; return the seconds of capture, and the steps in between."""
    monkeypatch.setattr(sampling, "has_compiled", lambda: compiled)
    now = [0.0]
    model = GLA(8, 2)
    config = MonitorConfig(every_n_steps=10, overhead_budget_ratio=0.5)
    with Monitor(model, config, exporters=[], clock=lambda: now[0]) as monitor:
        for step in range(13):
            now[0] += 5.0 if step == 10 else 1.0
            model(torch.randn(2, 6, 8)).square().mean().backward()
            monitor.step()
            monitor.flush()
        capture = monitor.snapshot().overhead_seconds["capture"].total_seconds
        return capture, monitor._context.cadence.wanted_steps


def test_what_an_eager_step_takes_longer_stretches_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cost_of_capture(monkeypatch, compiled=True)[0] == pytest.approx(4.0)
    assert cost_of_capture(monkeypatch, compiled=False)[0] == 0.0


def test_it_is_known_whether_anything_was_compiled() -> None:
    torch._dynamo.utils.counters.clear()
    assert not has_compiled()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert has_compiled()
