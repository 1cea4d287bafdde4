"""Layers of which ESS says little: measured and exported, diagnosed only when asked."""

from __future__ import annotations

import torch
from torch import nn

from ess_monitor import Monitor, MonitorConfig

EAGER = {
    "warmup_steps": 0,
    "patience": 1,
    "saturated_patience": 1,
    "metric": "accuracy",
    "metric_solved": 0.9,
    "metric_new_values": 1,
}


class Net(nn.Module):
    """A causal convolution of four taps in front of one of a hundred."""

    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Conv1d(4, 4, 4, padding=3, groups=4)
        self.long = nn.Conv1d(4, 4, 100, padding=99, groups=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[-1]
        hidden: torch.Tensor = self.short(x)[..., :length]
        result: torch.Tensor = self.long(hidden)[..., :length]
        return result


def conditions_of(net: nn.Module, **diagnosis: object) -> dict[str, str]:
    config = MonitorConfig.load(
        environment=False, every_n_steps=1, overhead_budget_ratio=None, diagnosis={**EAGER, **diagnosis}
    )
    with Monitor(net, config) as monitor:
        for _ in range(4):
            net(torch.randn(4, 4, 256)).sum().backward()  # a random filter
            monitor.step(metrics={"accuracy": 0.1})
            monitor.flush()
        readings = {reading.layer: reading for reading in monitor.readings}
        assert readings["short"].status == "ok"
        assert readings["short"].utilization_ratio > 0.8
        return dict(monitor.conditions)


def test_a_short_filter_is_measured_and_stays_unknown_and_a_long_one_is_judged() -> None:
    found = conditions_of(Net())
    assert found["short"] == "unknown"
    assert found["long"] != "unknown"


def test_it_is_judged_when_asked() -> None:
    assert conditions_of(Net(), judge_uninformative=True)["short"] != "unknown"
