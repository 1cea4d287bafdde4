"""How the settings of a callback are given."""

from __future__ import annotations

import pytest

from ess_monitor.exporters import LogConfig
from ess_monitor.integrations.common import CallbackBase


def test_keywords_lie_on_top_of_the_configuration_and_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESS_MONITOR_CAPTURE__HEADS", "2")
    config = CallbackBase({"every_n_steps": 7, "tolerance": 0.5}, every_n_steps=9, exporters=["log"]).config
    assert (config.every_n_steps, config.tolerance, config.capture.heads) == (9, 0.5, 2)
    assert config.exporters == (LogConfig(),)
