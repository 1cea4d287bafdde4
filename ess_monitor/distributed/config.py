"""Which ranks measure, and how long they wait for each other."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from ess_monitor import validation

_MEASURING = 64
"""Ranks that measure in a large run, unless something else is set."""


class DistributedConfig(BaseModel):
    """How the ranks of a distributed run measure together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ranks: Literal["zero", "all"] | PositiveInt | None = None
    """Which ranks measure their own data: the first one, each, or so many, evenly spread. From two on, readings are
    means over them, with the smallest utilization and the rank it was seen on, agreed at the same step everywhere.
    None: the first one as long as nothing is acted upon, because its data are a fair sample of a data-parallel run and
    nobody waits for anybody; 64 of them, or all there are, in mode auto, where one rank's odd batch must not decide.
    More than some dozens make the mean no better, and the store's host pays for each."""
    limit_seconds: float = Field(default=5.0, gt=0, le=600)
    """How long a rank waits for the others at an agreed step, before the sample is skipped on all of them. The
    training's collectives have just brought the ranks together, so they differ by milliseconds; 5 s are a long pause of
    the garbage collector or the file system, and 3 skips in a row (15 s) turn the exchange off."""


def measuring_ranks(ranks: str | int | None, world_size: int, *, acts: bool) -> tuple[int, ...]:
    """The ranks that measure, rank 0 always among them.

    Args:
        ranks: `DistributedConfig.ranks`.
        world_size: how many there are.
        acts: whether the autopilot may act.

    Raises:
        ConfigError: an argument is none of these.

    Example:
        >>> measuring_ranks(3, 8, acts=False), measuring_ranks(None, 8, acts=False)
        ((0, 2, 5), (0,))
        >>> len(measuring_ranks(None, 10_000, acts=True))
        64
    """
    world_size, acts = validation.whole("world_size", world_size, 1), validation.flag("acts", acts)
    if not (ranks is None or (isinstance(ranks, str) and ranks in ("zero", "all"))):
        ranks = validation.whole("ranks", ranks, 1, hint='"zero", "all" and None are allowed too')
    named = {"zero": 1, "all": world_size, None: _MEASURING if acts else 1}
    count = min(world_size, ranks if isinstance(ranks, int) else named[ranks])
    return tuple(k * world_size // count for k in range(count))
