"""A reading says against what its tolerance was measured, and which of its numbers the bounds are of."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from ess_monitor import MonitorConfig, capture_operators, profile
from ess_monitor.distributed.reduction import RankReduction
from ess_monitor.exporters.tensorboard.layout import custom_scalars_layout
from ess_monitor.exporters.terminal.inspected import reading_table
from ess_monitor.featurizers import build_mixer
from ess_monitor.records import Reading, SampleResult
from ess_monitor.report.components import tolerance_title
from tests.ess.test_unit_rows import unit_rows


def _mixer(factor: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    mixer = build_mixer("gla", 16, 2, 8, beta=1.0).double()
    with torch.no_grad():
        for parameter in mixer.features.q.parameters():
            parameter *= factor
    return mixer


def _reading(mixer: nn.Module, scale: Literal["absolute", "output"], positions: int = 3) -> Reading:
    torch.manual_seed(1)
    inputs = torch.randn(2, 16, 16, dtype=torch.float64)
    (found,) = profile(mixer, inputs, config=MonitorConfig(tolerance_scale=scale, positions=positions)).readings
    return found


def test_a_small_query_empties_the_absolute_size_and_not_the_one_by_the_output() -> None:
    small, plain = _mixer(1e-7), _mixer()
    assert _reading(small, "absolute").effective_size == 0.0
    torch.manual_seed(1)
    (operator,) = capture_operators(plain, torch.randn(2, 16, 16, dtype=torch.float64)).values()
    T = unit_rows(operator.materialize())
    sizes = [(torch.linalg.svdvals(T[..., i:, :i]) > 1e-3).sum(-1).double().mean() for i in (4, 8, 12)]
    for mixer in (small, plain):
        found = _reading(mixer, "output")
        assert found.effective_size == pytest.approx(float(sum(sizes)) / 3)
        assert found.tolerance_scale == "output"
        assert tolerance_title(found) == "0.001 of each token's output"
        assert "as a share of each token's output" in reading_table("", [found]).caption  # type: ignore[operator]


@pytest.mark.parametrize("scale", ["absolute", "output"])
def test_a_reading_holds_the_size_at_other_tolerances(scale: Literal["absolute", "output"]) -> None:
    found, mixer = _reading(_mixer(0.01), scale), _mixer(0.01)
    torch.manual_seed(1)
    (operator,) = capture_operators(mixer, torch.randn(2, 16, 16, dtype=torch.float64)).values()
    T = operator.materialize() if scale == "absolute" else unit_rows(operator.materialize())
    assert [tau for tau, _ in found.effective_size_at] == [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    assert dict(found.effective_size_at)[1e-3] == pytest.approx(found.effective_size)
    for tau, size in found.effective_size_at:
        counts = [(torch.linalg.svdvals(T[..., i:, :i]) > tau).sum(-1).double().mean() for i in (4, 8, 12)]
        assert size == pytest.approx(float(sum(counts)) / 3)


@pytest.mark.parametrize("scale", ["absolute", "output"])
@pytest.mark.parametrize("positions", [1, 2, 5, 8])
def test_the_bounds_are_of_the_number_beside_them_and_hold_the_true_mean(
    scale: Literal["absolute", "output"], positions: int
) -> None:
    """8 positions of 16 tokens: the mean over the measured ones lies outside of the bounds of all of them."""
    mixer = _mixer()
    found, every = _reading(mixer, scale, positions), _reading(mixer, scale, 15)
    true = every.per_position[found.positions[0] - 1 : found.positions[-1]]
    lower, between, upper = found.effective_size_lower, found.effective_size_between, found.effective_size_upper
    assert lower is not None
    assert between is not None
    assert upper is not None
    assert lower - 1e-6 <= between <= upper + 1e-6
    assert lower - 1e-6 <= sum(true) / len(true) <= upper + 1e-6
    places = range(found.positions[0], found.positions[-1] + 1)
    left = [max(p for p in found.positions if p <= i) for i in places]
    right = [min(p for p in found.positions if p >= i) for i in places]
    at = dict(zip(found.positions, found.per_position, strict=True))
    drawn = [
        at[a] + (at[b] - at[a]) * ((i - a) / (b - a) if b > a else 0)
        for i, a, b in zip(places, left, right, strict=True)
    ]
    assert between == pytest.approx(sum(drawn) / len(drawn))
    caption = str(reading_table("", [found]).caption)
    assert f"every position from {found.positions[0]} to {found.positions[-1]}, with certified bounds" in caption


def test_the_band_in_tensorboard_is_around_its_own_number() -> None:
    layout = custom_scalars_layout(["mixer"])
    (margin,) = [chart for charts in layout.values() for chart in charts.values() if chart[0] == "Margin"]
    assert margin[1] == [f"ess_effective_size_{name}/mixer" for name in ("between", "lower", "upper")]


def test_bounds_and_sums_over_ranks_are_those_of_the_mean_that_they_stand_beside() -> None:
    names = ("effective_size", "effective_size_between", "effective_size_lower", "effective_size_upper")
    names = (*names, "total_effective_size", "total_state_capacity")
    reduction = RankReduction(["mixer"], [], ranks=(0, 1))
    samples = []
    for size in (2.0, 6.0):
        sizes = dict(zip(names, (size, size, size - 0.5, size + 0.5, 4 * size, 32.0), strict=True))
        samples.append(SampleResult(7, (Reading(step=7, layer="mixer", status="ok", utilization_ratio=0.5, **sizes),)))
    values = reduction.reduce([reduction.encode(sample, 100) for sample in samples])
    for sample in samples:
        (agreed,) = reduction.decode(sample, values)[0].readings
        assert [getattr(agreed, name) for name in names] == [4.0, 4.0, 3.5, 4.5, 16.0, 32.0]
