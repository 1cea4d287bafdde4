"""Lets all ranks agree on the same numbers, with one small exchange that can never make them wait without limit.

Every rank measures its own data, but a decision that changes the model must be the same everywhere. So at a step that
all ranks know, each measuring rank sends a few numbers, and all ranks read one result: the reduced numbers, or that the
sample is skipped.

No collective is used. A collective that one rank misses fails on the others at different times, and its group is broken
from then on. Here numbers and result are keys of the store that the processes met at when the run began. The store
handles one request at a time, and the first to set the result wins (`compare_set`): from then on every rank reads the
same one, also a rank that comes late. The order of the training's collectives cannot change.
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

Reduce = Callable[[Sequence[Sequence[float]]], Sequence[float]]
"""Makes one list of the lists of the measuring ranks, in their order. Runs on the first of them only."""

SKIPS_IN_A_ROW = 3
"""Skips after which the exchange is off: each further one would cost the limit again."""
_STORE_LIMIT_FACTOR = 2.0
"""How long the store may take to answer before it counts as lost, as a multiple of the limit."""
_KEPT_RESULTS = 8
"""Results that stay in the store. No rank is that far behind: the training's own collectives hold it."""
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.0005, 0.05
"""Pauses between two looks at the store; doubled each time."""
_PAUSE_PER_RANK_SECONDS = 5e-6
"""What each rank adds to the first pause, so that thousands of ranks do not flood the store's one thread."""

_AGREED, _SKIPPED = b"agreed:", b"skipped:"


@dataclass(frozen=True)
class ConsensusResult:
    """Holds what all ranks read at an agreed step."""

    values: tuple[float, ...] | None
    """The reduced numbers; None where the sample is skipped."""
    reason: str = ""
    """Why it is skipped."""
    everywhere: bool = True
    """False where this rank does not know what the others read."""


class StoreConsensus:
    """Exchanges numbers with the other ranks, on one rank.

    Every rank builds it and calls `exchange` for the same steps. A rank that loses the store skips alone, at once and
    for the rest of the run; the others then skip because its numbers are missing.

    Args:
        store: reached by all ranks; nobody else may use these keys.
        rank: of this process.
        world_size: number of ranks.
        measuring: ranks that send numbers, by default all; the others only read the result. The first one reduces.
        limit_seconds: how long to wait for the others.

    Raises:
        ConfigError: an argument has a value it cannot have.

    Examples:
        >>> import torch.distributed as dist
        >>> alone = StoreConsensus(dist.HashStore(), rank=0, world_size=1)
        >>> alone.exchange(100, [1.0, 2.0], lambda ranks: [sum(column) for column in zip(*ranks)]).values
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
            raise ConfigError(f"store: {validation.type_of(store)} is not a store with compare_set; {hint}.")
        self.world_size = validation.whole("world_size", world_size, 1)
        self.rank = validation.whole("rank", rank, 0, self.world_size - 1)
        self.measuring = _distinct(measuring, self.world_size)
        self.limit_seconds = validation.real("limit_seconds", limit_seconds, above=0.0)
        self.skipped = 0
        """Number of skipped exchanges."""
        self.reason = ""
        """Why the exchange is off; empty while it is on."""
        self._store = store
        self._clock, self._sleep = validation.function("clock", clock), validation.function("sleep", sleep)
        self._in_a_row = 0
        self._stopping = False
        self._sent = ""
        """Key of the numbers that were sent last."""
        self._last_step, self._pass = -1, 0
        self._results: deque[str] = deque()
        """Keys of the results in the store."""

    @classmethod
    def of_the_run(cls, measuring: Sequence[int] | None = None, *, limit_seconds: float = 5.0) -> StoreConsensus:
        """Build it over the store of `torch.distributed`'s default group; call it on every rank alike.

        Raises:
            ConfigError: the group's store cannot be used.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        return cls(store_of_the_run(), rank, world_size, measuring=measuring, limit_seconds=limit_seconds)

    @property
    def off(self) -> bool:
        """True once this run has no more exchanges; all ranks that reach the store turn it off after the same one."""
        return bool(self.reason)

    @property
    def measures(self) -> bool:
        """True where this rank sends numbers."""
        return self.rank in self.measuring

    def exchange(self, step: int, values: Sequence[float] | None, reduce: Reduce) -> ConsensusResult:
        """Send `values` and read the result. Takes the limit at most, twice that where the store hangs; never raises.

        Args:
            step: the agreed step. One that is not after the last one begins a new pass over these steps, on all ranks.
            values: this rank's numbers, as many on every rank; NaN for a missing one. None where it does not measure.
            reduce: makes one list of the lists of all measuring ranks.
        """
        if self.off:
            return ConsensusResult(None, self.reason)
        if step <= self._last_step:  # the run went back to a checkpoint: earlier results for these steps do not count
            self._pass += 1
        self._last_step = step
        try:
            # On a thread: a call of the store has no time limit of its own where the server's machine hangs.
            limit = _STORE_LIMIT_FACTOR * self.limit_seconds
            answer = _within(limit, lambda: self._agree(step, values, reduce), self._request_stop)
        except Exception as error:
            self.reason = f"the run's store cannot be reached ({format_error(error)})"
            self.skipped += 1
            return ConsensusResult(None, self.reason, everywhere=False)
        if answer.startswith(_AGREED):
            self._in_a_row = 0
            return ConsensusResult(_unpack(answer.removeprefix(_AGREED)))
        reason = answer.removeprefix(_SKIPPED).decode(errors="replace")
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= SKIPS_IN_A_ROW:
            self.reason = f"{SKIPS_IN_A_ROW} samples in a row were skipped, the last because {reason}"
        return ConsensusResult(None, reason)

    def _request_stop(self) -> float:
        self._stopping = True
        return SHUTDOWN_GRACE_SECONDS

    def _agree(self, step: int, values: Sequence[float] | None, reduce: Reduce) -> bytes:
        """Return the result as it is in the store."""
        prefix = f"{self._pass}/{step}"
        result = f"{prefix}/result"
        numbers = [f"{prefix}/{rank}" for rank in self.measuring]
        reduces = self.rank == self.measuring[0]
        if reduces:
            self._results.append(result)
            if len(self._results) > _KEPT_RESULTS:
                self._delete(self._results.popleft())
        if self._store.check([result]):  # this rank is late, and has nothing to add
            return self._store.get(result)
        if values is not None and self.measures:
            self._send(f"{prefix}/{self.rank}", _pack(values))
        deadline = self._clock() + self.limit_seconds
        pause = _FIRST_PAUSE_SECONDS + _PAUSE_PER_RANK_SECONDS * self.world_size
        longest = max(_LONGEST_PAUSE_SECONDS, 10 * pause)
        while not self._store.check([result]):
            if reduces and self._store.check(numbers):
                return self._store.compare_set(result, "", self._reduced(numbers, reduce))
            left = deadline - self._clock()
            if left <= 0:
                return self._store.compare_set(result, "", _SKIPPED + self._missing(numbers).encode())
            if self._stopping:
                raise InterruptedError("the process ends")
            self._sleep(min(pause, left))
            pause = min(2 * pause, longest)
        return self._store.get(result)

    def _reduced(self, keys: list[str], reduce: Reduce) -> bytes:
        numbers = [self._store.get(key) for key in keys]
        try:
            return _AGREED + _pack(reduce([_unpack(each) for each in numbers]))
        except ValueError as error:
            why = f"the ranks' numbers do not fit together ({error}); give all ranks the same model and settings"
        except Exception as error:
            why = f"the ranks' numbers could not be reduced ({format_error(error)})"
        return _SKIPPED + why.encode()

    def _missing(self, keys: list[str]) -> str:
        late = [rank for rank, key in zip(self.measuring, keys, strict=True) if not self._store.check([key])]
        named = ", ".join(map(str, late[:8])) + (f" and {len(late) - 8} more" if len(late) > 8 else "")
        who = f"nothing came from rank {named}" if late else f"rank {self.measuring[0]} gave no result"
        return f"{who} within {self.limit_seconds:g} s of rank {self.rank}"

    def _send(self, key: str, numbers: bytes) -> None:
        if self._sent:
            self._delete(self._sent)
        self._sent = key
        self._store.set(key, numbers)

    def _delete(self, key: str) -> None:
        with contextlib.suppress(RuntimeError, NotImplementedError):  # some stores cannot delete; a few bytes remain
            self._store.delete_key(key)


def _pack(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}d", *values)


def _unpack(numbers: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(numbers) // 8}d", numbers)


def _distinct(measuring: Sequence[int] | None, world_size: int) -> tuple[int, ...]:
    if measuring is None:
        return tuple(range(world_size))
    hint = "give the ranks that send numbers, in ascending order"
    ranks = validation.wholes("measuring", measuring, 0, world_size - 1, hint=hint)
    if not ranks or list(ranks) != sorted(set(ranks)):
        raise ConfigError(f"measuring={validation.shown(measuring)} must name each rank once; {hint}.")
    return ranks


def _within(seconds: float, work: Callable[[], T], request_stop: Callable[[], float]) -> T:
    """Return the result of `work`, or raise its exception. It runs on a `TorchThread` with this `request_stop`.

    Raises:
        TimeoutError: it took longer. Its thread is left alone and does not keep the process.
    """
    done: queue.SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:
            done.put((None, error))

    TorchThread(run, "ess-monitor-agreement", request_stop).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
