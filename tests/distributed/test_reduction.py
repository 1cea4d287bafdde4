"""What the ranks tell each other, and what it comes to, where they differ in more than numbers."""

from __future__ import annotations

import pytest

from ess_monitor.distributed.reduction import RankReduction
from ess_monitor.records import Reading, SampleResult


def seen(status: str, use: float | None = None, **more: object) -> SampleResult:
    sizes = {} if use is None else {"effective_size": 8 * use, "utilization_ratio": use}
    return SampleResult(7, (Reading(step=7, layer="mixer", status=status, **sizes, **more),))  # type: ignore[arg-type]


def test_a_layer_that_is_not_finite_on_one_rank_is_so_on_all() -> None:
    reduction = RankReduction(["mixer"], ["loss"], ranks=(0, 1, 2))
    mine = [seen("ok", 0.75), seen("nonfinite", message="2 of 8 operators hold NaN or Inf"), seen("failed")]
    values = reduction.reduce([reduction.encode(evidence, 100) for evidence in mine])
    agreed = [reduction.decode(evidence, values)[0].readings[0] for evidence in mine]
    assert [reading.status for reading in agreed] == ["nonfinite"] * 3
    assert [reading.utilization_ratio for reading in agreed] == [None] * 3
    assert agreed[0].message == "NaN or Inf on another rank"
    assert agreed[1].message == "2 of 8 operators hold NaN or Inf"


def test_ranks_that_watch_other_layers_do_not_average_them() -> None:
    here, there = RankReduction(["a", "b"], [], ranks=(0, 1)), RankReduction(["b", "c"], [], ranks=(0, 1))
    evidence = SampleResult(7, ())
    with pytest.raises(ValueError, match="layers differ"):
        here.reduce([here.encode(evidence, 100), there.encode(evidence, 100)])


def test_ranks_agree_on_how_slow_a_layer_was_and_on_which_layers_had_their_turn() -> None:
    reduction = RankReduction(["a", "b", "c"], ["loss"], ranks=(0, 1))
    mine = [SampleResult(7, (), slowness={"a": 1.25, "b": 0.0}), SampleResult(7, (), slowness={"a": 1.5})]
    values = reduction.reduce([reduction.encode(sample, 100) for sample in mine])
    assert [reduction.decode(sample, values)[0].slowness for sample in mine] == [{"a": 1.5, "b": 0.0}] * 2
    assert reduction.decode(SampleResult(7, ()), values)[0].slowness == {"a": 1.5, "b": 0.0}, "a rank that only follows"
