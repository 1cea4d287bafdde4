"""One real run, trained once, and its log."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ess_monitor import Monitor, MonitorConfig
from ess_monitor.featurizers import build_mixer


@pytest.fixture(scope="package")
def real_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The event log of twenty steps of a net of a gated layer and of softmax attention."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    model = nn.Sequential(build_mixer("gla", 16, 2, 4), build_mixer("sa", 16, 2, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = MonitorConfig(
        every_n_steps=2,
        overhead_budget_ratio=None,
        run_name="a real run",
        exporters=[{"kind": "event_log", "path": folder / "ess_events.jsonl"}],
    )
    with Monitor(model, config) as monitor:
        for _ in range(20):
            loss = model(torch.randn(4, 32, 16)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(metrics={"loss": loss})
            monitor.flush()
    return folder / "ess_events.jsonl"
