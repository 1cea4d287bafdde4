"""Small valid inputs for the calls of the registry."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ess_monitor import Finding, LayerInfo, Measurement, Reading
from ess_monitor.ess import DiagonalRecurrence
from ess_monitor.featurizers import GLA, GLAS6
from ess_monitor.records import Evidence, RunInfo, StateEvidence
from ess_monitor.report import RunHistory

READING = Reading(
    step=1, layer="a", status="ok", length=16, state_capacity=4.0, effective_size=2.0, utilization_ratio=0.5
)
EVIDENCE = Evidence(
    step=1, layer="a", basis="loss", batches=8, base=2.0, m50=0.0, m90=0.1, cut=0.5, outcome="loud", reason="seen"
)
STATE_EVIDENCE = StateEvidence(
    step=1,
    layer="a",
    basis="loss",
    batches=8,
    base=2.0,
    quarter=0.5,
    half=1.0,
    whole=2.0,
    outcome="needed",
    reason="seen",
)
FINDING = Finding(step=1, layer="a", condition="collapsed", previous="unknown", reason="low")
MEASUREMENT = Measurement(
    step=1, timestamp_seconds=0.0, readings=(READING,), conditions={"a": "collapsed"}, findings=(FINDING,)
)
RUN = RunInfo(run_name="demo", model="Net", layers=(LayerInfo(name="a", module="GLA", supported=True),))
HISTORY = RunHistory(Path("events.jsonl"), RUN, (MEASUREMENT,))


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def recurrence() -> DiagonalRecurrence:
    return DiagonalRecurrence(-torch.rand(1, 2, 6, 3), floats(1, 2, 6, 3), floats(1, 2, 6, 3))


def model() -> GLA:
    return GLA(8, 2)


def layer_with_alpha() -> GLAS6:
    return GLAS6(8, 2)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)
