"""Who measures in a distributed run."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ess_monitor import ConfigError, MonitorConfig
from ess_monitor.distributed.config import measuring_ranks


@given(count=st.integers(1, 300), world=st.integers(1, 300), acts=st.booleans())
def test_measuring_ranks_are_so_many_different_ones_and_rank_0_is_one(count: int, world: int, acts: bool) -> None:
    ranks = measuring_ranks(count, world, acts=acts)
    assert len(set(ranks)) == len(ranks) == min(count, world)
    assert ranks[0] == 0
    assert all(0 <= rank < world for rank in ranks)
    gaps = {b - a for a, b in zip(ranks, (*ranks[1:], world), strict=True)}
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("ranks", "acts", "count"), [(None, False, 1), (None, True, 64), ("zero", True, 1), ("all", False, 200)]
)
def test_the_default_is_rank_0_until_something_is_acted_upon(ranks: Any, acts: bool, count: int) -> None:
    assert len(measuring_ranks(ranks, 200, acts=acts)) == count


@pytest.mark.parametrize("bad", [{"ranks": "some"}, {"ranks": 0}, {"limit_seconds": 0}, {"rank": "all"}])
def test_a_setting_that_cannot_be_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="distributed"):
        MonitorConfig.load(environment=False, distributed=bad)
