"""The share from afar of a reading: from the operators of a sample, and over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from ess_monitor import CaptureConfig, MonitorConfig, capture_operators, profile
from ess_monitor.distributed.reduction import RankReduction
from ess_monitor.ess import Operator
from ess_monitor.featurizers import build_mixer
from ess_monitor.pipeline.readings import compute
from ess_monitor.records import Reading, SampleResult
from tests.ess.kinds import HEADS, KINDS, SAMPLES


@pytest.mark.parametrize("name", ["gla", "wla", "sa"])
@pytest.mark.parametrize(("positions", "middle"), [("midpoint", 24), (3, 24), (2, 16), ("all", 24)])
def test_a_reading_has_the_share_of_all_operators_together(name: str, positions: str | int, middle: int) -> None:
    torch.manual_seed(0)
    mixer, x = build_mixer(name, 16, 2, 8), torch.randn(3, 48, 16)
    config = MonitorConfig(positions=positions, capture=CaptureConfig(samples=3, heads=None))
    (reading,) = profile(mixer, x, config=config).readings
    (operator,) = capture_operators(mixer, x).values()
    rows = operator.materialize().double()[..., middle + 6 :, :]
    share = math.sqrt(float(rows[..., :middle].square().sum() / rows.square().sum()))
    assert 0 < share < 1
    assert reading.far_share_ratio == pytest.approx(share, rel=1e-5)


@pytest.mark.parametrize(("length", "known"), [(2, False), (7, False), (8, True), (9, True)])
def test_a_sequence_without_an_eighth_has_no_share(length: int, known: bool) -> None:
    (reading,) = profile(build_mixer("la", 16, 2, 8), torch.randn(2, length, 16)).readings
    assert reading.status == "ok"
    assert (reading.far_share_ratio is not None) == known


def test_a_position_near_the_end_leaves_no_row() -> None:
    sample = SimpleNamespace(
        operator=KINDS["recurrence"]().select(length=9), claims=(), window=None, with_retention=True
    )
    assert "far_squared" in compute(sample, (7,), 1e-3)  # type: ignore[arg-type]
    assert "far_squared" not in compute(sample, (8,), 1e-3)  # type: ignore[arg-type]


def test_a_layer_that_puts_out_nothing_has_no_share() -> None:
    mixer = build_mixer("la", 16, 2, 8)
    for parameter in mixer.parameters():
        torch.nn.init.zeros_(parameter)
    (reading,) = profile(mixer, torch.randn(2, 32, 16)).readings
    assert (reading.status, reading.effective_size, reading.far_share_ratio) == ("ok", 0.0, None)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_computing_a_reading_waits_for_no_device(make: Callable[[], Operator]) -> None:
    operator = make().map(lambda tensor: tensor.to("meta"))  # any look at a value raises
    sample = SimpleNamespace(operator=operator, claims=(), window=None, with_retention=True)
    results = compute(sample, (3, 6, 9), 1e-3)  # type: ignore[arg-type]
    assert results["far_squared"].shape == results["total_squared"].shape == ()
    assert results["tolerance_ess"].shape == (SAMPLES, HEADS, 3)


def test_ranks_agree_on_the_mean_of_those_that_have_a_share() -> None:
    reduction = RankReduction(["mixer"], [], ranks=(0, 1, 2))
    shares = (0.5, None, 0.25)
    samples = [
        SampleResult(7, (Reading(step=7, layer="mixer", status="ok", effective_size=4, far_share_ratio=share),))
        for share in shares
    ]
    values = reduction.reduce([reduction.encode(sample, 100) for sample in samples])
    agreed = [reduction.decode(sample, values)[0].readings[0].far_share_ratio for sample in samples]
    assert agreed == [0.375] * 3
