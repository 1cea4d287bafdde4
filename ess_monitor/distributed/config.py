"""Settings of distributed runs: which ranks measure, and how long they wait for each other."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from ess_monitor import validation
from ess_monitor.validation.settings import Settings

_MOST_BY_DEFAULT = 64
"""Ranks that measure by default where the autopilot may act."""


class DistributedConfig(Settings):
    """Sets how the ranks of a distributed run measure together."""

    ranks: Literal["zero", "all"] | PositiveInt | None = None
    """Which ranks measure their own data: the first one, all, or a number of them, evenly spread. With two or more,
    readings are means over them, with the smallest utilization and the rank it was seen on, agreed at the same step on
    all ranks. None is the first one unless the autopilot may act: its data are a fair sample of a data-parallel run,
    and no rank waits. In mode auto None is 64 ranks, or all if there are fewer, so that one rank's odd batch does not
    decide. More than some dozens hardly improve the mean, and each costs time on the store's host."""
    limit_seconds: float = Field(default=5.0, gt=0, le=600)
    """Seconds a rank waits for the others at an agreed step before all ranks skip the sample. The training's
    collectives have just brought the ranks together, so they differ by milliseconds; 5 s allow for a long pause of the
    garbage collector or the file system. 3 skips in a row (15 s) turn the exchange off."""


def measuring_ranks(ranks: str | int | None, world_size: int, *, acts: bool) -> tuple[int, ...]:
    """Return the ranks that measure; rank 0 is always one of them.

    Args:
        ranks: `DistributedConfig.ranks`.
        world_size: number of ranks.
        acts: whether the autopilot may act.

    Raises:
        ConfigError: an argument has a value it cannot have.

    Examples:
        >>> measuring_ranks(3, 8, acts=False), measuring_ranks(None, 8, acts=False)
        ((0, 2, 5), (0,))
        >>> len(measuring_ranks(None, 10_000, acts=True))
        64
    """
    world_size, acts = validation.whole("world_size", world_size, 1), validation.flag("acts", acts)
    if not (ranks is None or (isinstance(ranks, str) and ranks in ("zero", "all"))):
        ranks = validation.whole("ranks", ranks, 1, hint='"zero", "all" and None are allowed too')
    named = {"zero": 1, "all": world_size, None: _MOST_BY_DEFAULT if acts else 1}
    count = min(world_size, ranks if isinstance(ranks, int) else named[ranks])
    return tuple(k * world_size // count for k in range(count))
