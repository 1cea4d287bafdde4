"""A diagnosis that calls everything collapsed, at once and for good: for tests of the acting."""

from __future__ import annotations

from typing import Any

EAGER_DIAGNOSIS: dict[str, Any] = {
    "collapsed_below": 0.9,
    "collapsed_recovers_above": 0.95,
    "retention_below": 0.98,
    "retention_recovers_above": 0.99,
    "warmup_steps": 0,
    "patience": 1,
    "metric": "accuracy",
    "metric_solved": 0.99,
    "metric_new_values": 1,
}

NO_EVIDENCE: dict[str, Any] = {"enabled": False}
"""Settings `evidence` of the same tests: what is done to a layer, and not what supports it, is tested."""
