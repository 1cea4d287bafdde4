"""One small exchange by which all ranks come to the same numbers, and which nothing can make them wait for.

Every rank measures its own data. A decision that changes the model must be the same everywhere, so at a step that all
ranks know each posts a few numbers, and all read one verdict: what the posts come to, or that this sample is skipped.

No collective is involved. A collective that one rank misses fails on the others at different times, and its group is
broken from then on. Here posts and verdict are keys of the store that the processes met at when the run began. Its
server does one thing after the other, and the verdict is set by whoever comes first (`compare_set`): once it is
there, every rank reads the same, also one that comes late. The order of the training's collectives cannot change.
"""

from __future__ import annotations

import contextlib
import queue
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from ess_monitor import validation
from ess_monitor.distributed.store import Store, store_of_the_run
from ess_monitor.errors import ConfigError, format_error
from ess_monitor.runtime.shutdown import SHUTDOWN_GRACE_SECONDS, TorchThread

T = TypeVar("T")

Fold = Callable[[Sequence[Sequence[float]]], Sequence[float]]
"""What the posts, in the order of the measuring ranks, come to. Runs on the first rank only."""

SKIPS_IN_A_ROW = 3
"""After so many the exchange is off: something is wrong for good, and every further one would cost the limit again."""
_HARD_SHARE = 2.0
"""Of the limit: how long the store itself may take to answer before it counts as lost."""
_KEPT_VERDICTS = 8
"""Verdicts that stay in the store. A rank cannot be that far behind: the training's own collectives hold it."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.05
"""Seconds between two looks at the store; doubled each time."""
_PAUSE_OF_A_RANK = 5e-6
"""Seconds a rank adds to everybody's first pause, so that thousands together do not flood the store's one thread."""

_AGREED, _SKIPPED = b"agreed:", b"skipped:"


@dataclass(frozen=True)
class ConsensusResult:
    """What all ranks read at an agreed step."""

    values: tuple[float, ...] | None
    """What the posts came to; None where the sample is skipped."""
    reason: str = ""
    """Why it is skipped."""
    everywhere: bool = True
    """False where this rank does not know what the others read."""


class StoreConsensus:
    """The exchange, on one rank.

    Every rank builds it, and calls `exchange` for the same steps. A rank that cannot reach the store any more skips on
    its own, at once and for the rest of the run; the others then skip because it is late.

    Args:
        store: reached by all ranks, and under these keys by nobody else.
        rank: of this process.
        world_size: how many ranks there are.
        measuring: ranks that post; the others read the verdict only. The first one collects. By default all.
        limit_seconds: how long to wait for the others.

    Raises:
        ConfigError: an argument is none of these.

    Example:
        >>> import torch.distributed as dist
        >>> alone = StoreConsensus(dist.HashStore(), rank=0, world_size=1)
        >>> alone.exchange(100, [1.0, 2.0], lambda posts: [sum(column) for column in zip(*posts)]).values
        (1.0, 2.0)
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        measuring: Sequence[int] | None = None,
        limit_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if isinstance(store, type) or not hasattr(store, "compare_set"):
            hint = "give one of torch.distributed's, or use StoreConsensus.of_the_run"
            raise ConfigError(f"store: {validation.type_of(store)} is no store with compare_set; {hint}.")
        self.world_size = validation.whole("world_size", world_size, 1)
        self.rank = validation.whole("rank", rank, 0, self.world_size - 1)
        self.measuring = _distinct(measuring, self.world_size)
        self.limit_seconds = validation.real("limit_seconds", limit_seconds, above=0.0)
        validation.function("clock", clock)
        validation.function("sleep", sleep)
        self.skipped = 0
        """Exchanges that were skipped."""
        self._store = store
        self._clock, self._sleep = clock, sleep
        self._in_a_row = 0
        self._off = ""
        self._leaving = False
        self._posted = ""
        self._last_step, self._generation = -1, 0
        self._verdicts: deque[str] = deque()

    @classmethod
    def of_the_run(cls, measuring: Sequence[int] | None = None, *, limit_seconds: float = 5.0) -> StoreConsensus:
        """Over the store of `torch.distributed`'s default group; call it on every rank alike.

        Raises:
            ConfigError: the group has no store that can be used.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        return cls(store_of_the_run(), rank, world_size, measuring=measuring, limit_seconds=limit_seconds)

    @property
    def off(self) -> bool:
        """True once there are no more exchanges in this run; after the same one on all ranks that reach the store."""
        return bool(self._off)

    @property
    def reason(self) -> str:
        """Why it is off; empty while it is on."""
        return self._off

    @property
    def measures(self) -> bool:
        """True where this rank posts numbers."""
        return self.rank in self.measuring

    def exchange(self, step: int, values: Sequence[float] | None, fold: Fold) -> ConsensusResult:
        """Post `values` and read the verdict. Takes the limit at most, twice that where the store hangs; never raises.

        Args:
            step: the agreed step. One that is not after the last one begins a new pass over these steps, on all ranks.
            values: this rank's numbers, as many on every rank; NaN for one it does not have. None where it does not
                measure.
            fold: makes one list of all of them.
        """
        if self._off:
            return ConsensusResult(None, self._off)
        if step <= self._last_step:  # the run went back to a checkpoint: what was said of these steps does not count
            self._generation += 1
        self._last_step = step
        try:
            # In a thread: a call of the store has no time limit of its own where the server's machine hangs.
            answer = _within(_HARD_SHARE * self.limit_seconds, lambda: self._settle(step, values, fold), self._leave)
        except Exception as error:
            self._off = f"the run's store cannot be reached ({format_error(error)})"
            self.skipped += 1
            return ConsensusResult(None, self._off, everywhere=False)
        if answer.startswith(_AGREED):
            self._in_a_row = 0
            numbers = answer[len(_AGREED) :]
            return ConsensusResult(struct.unpack(f"<{len(numbers) // 8}d", numbers))
        return self._skip(answer.removeprefix(_SKIPPED).decode(errors="replace"))

    def _leave(self) -> float:
        self._leaving = True
        return SHUTDOWN_GRACE_SECONDS

    # -- the verdict --------------------------------------------------------------------------------------------------

    def _settle(self, step: int, values: Sequence[float] | None, fold: Fold) -> bytes:
        """The verdict, as it is in the store."""
        these = f"{self._generation}/{step}"
        verdict = f"{these}/verdict"
        posts = [f"{these}/{rank}" for rank in self.measuring]
        collects = self.rank == self.measuring[0]
        if collects:
            self._tidy(verdict)
        if not self._store.check([verdict]):  # one that comes late has nothing to add
            if values is not None and self.measures:
                self._post(f"{these}/{self.rank}", struct.pack(f"<{len(values)}d", *values))
            deadline = self._clock() + self.limit_seconds
            pause = _FIRST_PAUSE + _PAUSE_OF_A_RANK * self.world_size
            longest = max(_LONGEST_PAUSE, 10 * pause)
            while not self._store.check([verdict]):
                if collects and self._store.check(posts):
                    return self._store.compare_set(verdict, "", self._folded(posts, fold))
                left = deadline - self._clock()
                if left <= 0:
                    return self._store.compare_set(verdict, "", _SKIPPED + self._who_is_late(posts).encode())
                if self._leaving:
                    raise InterruptedError("the process ends")
                self._sleep(min(pause, left))
                pause = min(2 * pause, longest)
        return self._store.get(verdict)

    def _folded(self, posts: list[str], fold: Fold) -> bytes:
        numbers = [self._store.get(key) for key in posts]
        try:
            values = fold([struct.unpack(f"<{len(post) // 8}d", post) for post in numbers])
            return _AGREED + struct.pack(f"<{len(values)}d", *values)
        except ValueError as error:
            why = f"the ranks' numbers do not fit together ({error}); give all ranks the same model and settings"
        except Exception as error:
            why = f"the ranks' numbers could not be brought together ({format_error(error)})"
        return _SKIPPED + why.encode()

    def _who_is_late(self, posts: list[str]) -> str:
        late = [rank for rank, key in zip(self.measuring, posts, strict=True) if not self._store.check([key])]
        named = ", ".join(map(str, late[:8])) + (f" and {len(late) - 8} more" if len(late) > 8 else "")
        who = f"nothing came from rank {named}" if late else f"rank {self.measuring[0]} gave no verdict"
        return f"{who} within {self.limit_seconds:g} s of rank {self.rank}"

    # -- keys ---------------------------------------------------------------------------------------------------------

    def _post(self, key: str, numbers: bytes) -> None:
        before, self._posted = self._posted, key
        if before:
            self._delete(before)
        self._store.set(key, numbers)

    def _tidy(self, verdict: str) -> None:
        self._verdicts.append(verdict)
        if len(self._verdicts) > _KEPT_VERDICTS:
            self._delete(self._verdicts.popleft())

    def _delete(self, key: str) -> None:
        with contextlib.suppress(RuntimeError, NotImplementedError):  # a store that cannot; it keeps some bytes more
            self._store.delete_key(key)

    # -- skips --------------------------------------------------------------------------------------------------------

    def _skip(self, reason: str) -> ConsensusResult:
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= SKIPS_IN_A_ROW:
            self._off = f"{SKIPS_IN_A_ROW} samples in a row were skipped, the last because {reason}"
        return ConsensusResult(None, reason)


def _distinct(measuring: Sequence[int] | None, world_size: int) -> tuple[int, ...]:
    if measuring is None:
        return tuple(range(world_size))
    hint = "give the ranks that post, in ascending order"
    ranks = validation.wholes("measuring", measuring, 0, world_size - 1, hint=hint)
    if not ranks or list(ranks) != sorted(set(ranks)):
        raise ConfigError(f"measuring={validation.shown(measuring)} must name each rank once; {hint}.")
    return ranks


def _within(seconds: float, work: Callable[[], T], leave: Callable[[], float]) -> T:
    """The result of `work`, or what it raises; `leave` is that of the `TorchThread` it runs in.

    Raises:
        TimeoutError: it took longer. Its thread is left alone and does not keep the process.
    """
    done: queue.SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:
            done.put((None, error))

    TorchThread(run, "ess-monitor-agreement", leave).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
