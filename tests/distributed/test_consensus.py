"""The exchange between ranks: one result for all, whoever is late, dead or cut off."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from ess_monitor.distributed.consensus import SKIPS_IN_A_ROW, StoreConsensus
from ess_monitor.distributed.store import own_connection, store_of_the_run
from tests.ranks import CONTEXT

PATIENT = 60.0
"""Seconds that nobody is to need: a rank that waits so long fails the test."""


def sums(posts: Any) -> list[float]:
    return [sum(column) for column in zip(*posts, strict=True)]


def in_threads(work: list[Callable[[], Any]]) -> list[Any]:
    """What each returns, all at once."""
    results: list[Any] = [None] * len(work)

    def run(k: int) -> None:
        results[k] = work[k]()

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENT)
    return results


# -- threads as ranks, over a store in memory --------------------------------------------------------------------------


def test_every_rank_gets_what_the_posts_come_to() -> None:
    store = dist.HashStore()
    ranks = [StoreConsensus(store, rank, 5) for rank in range(5)]
    results = in_threads([lambda a=a: a.exchange(10, [a.rank, 0.1], sums) for a in ranks])
    assert {v.values for v in results} == {(10.0, 0.1 + 0.1 + 0.1 + 0.1 + 0.1)}


def test_ranks_that_do_not_measure_read_the_result() -> None:
    store = dist.HashStore()
    ranks = [StoreConsensus(store, rank, 6, measuring=(0, 3)) for rank in range(6)]
    assert [a.measures for a in ranks] == [True, False, False, True, False, False]
    work = [lambda a=a: a.exchange(1, [float(a.rank)] if a.measures else None, sums) for a in ranks]
    assert {v.values for v in in_threads(work)} == {(3.0,)}
    assert not store.check(["1/1"])


@settings(max_examples=25)
@given(
    delays=st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.01, 0.03, 0.05, 0.08]), min_size=2, max_size=9),
    limits=st.lists(st.sampled_from([0.01, 0.04, 0.06]), min_size=9, max_size=9),
    seed=st.integers(0, 2**32),
)
def test_whatever_the_delays_all_ranks_read_the_same_result(
    delays: list[float], limits: list[float], seed: int
) -> None:
    store, world = dist.HashStore(), len(delays)

    def rank(r: int) -> list[Any]:
        chance, agreement = random.Random(seed + r), StoreConsensus(store, r, world, limit_seconds=limits[r])
        results = []
        for step in range(3):
            time.sleep(delays[r] * chance.random())
            results.append(agreement.exchange(step, [float(r)], sums))
        return [results, agreement.off, agreement.skipped]

    results = in_threads([lambda r=r: rank(r) for r in range(world)])
    # A loaded machine may take longer than the store is given; that rank then skips alone, which is no other result.
    reached = [result for result in results if not any("cannot be reached" in v.reason for v in result[0])]
    assert all(result == reached[0] for result in reached)


def test_a_rank_that_comes_late_reads_that_the_others_went_on() -> None:
    store = dist.HashStore()
    early, late = StoreConsensus(store, 0, 2, limit_seconds=0.1), StoreConsensus(store, 1, 2, limit_seconds=PATIENT)
    first = early.exchange(7, [1.0], sums)
    assert first.values is None
    assert first.reason == "nothing came from rank 1 within 0.1 s of rank 0"
    assert late.exchange(7, [1.0], sums) == first
    assert not store.check(["7/1"]), "a late rank has nothing to add"
    again = in_threads([lambda: early.exchange(9, [1.0], sums), lambda: late.exchange(9, [2.0], sums)])
    assert [v.values for v in again] == [(3.0,)] * 2
    assert (early.skipped, late.skipped, early.off, late.off) == (1, 1, False, False)


def test_steps_that_are_done_again_are_agreed_on_again() -> None:
    store = dist.HashStore()
    ranks = [StoreConsensus(store, rank, 2) for rank in range(2)]

    def both(step: int, value: float) -> list[Any]:
        return in_threads([lambda a=a: a.exchange(step, [value], sums).values for a in ranks])

    assert both(100, 1.0) == [(2.0,)] * 2
    assert both(200, 2.0) == [(4.0,)] * 2
    assert both(100, 3.0) == [(6.0,)] * 2, "back at a checkpoint: what was said before does not count"
    assert both(200, 4.0) == [(8.0,)] * 2


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), OverflowError("x"), ValueError("x")])
def test_numbers_that_cannot_be_brought_together_skip_the_sample_on_all_ranks(error: Exception) -> None:
    def reduce(posts: Any) -> list[float]:
        raise error

    store = dist.HashStore()
    ranks = [StoreConsensus(store, rank, 2) for rank in range(2)]
    results = in_threads([lambda a=a: a.exchange(100, [1.0], reduce) for a in ranks])
    assert results[0] == results[1]
    assert results[0].everywhere
    assert "the ranks' numbers" in results[0].reason
    assert not ranks[0].off


def test_a_rank_that_loses_the_store_does_not_speak_for_the_others() -> None:
    class Gone(dist.HashStore):
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("connection reset")

    result = StoreConsensus(Gone(), 1, 2).exchange(100, [1.0], sums)
    assert result.values is None
    assert not result.everywhere


def test_after_skips_in_a_row_all_ranks_turn_the_exchange_off_and_nobody_waits_again() -> None:
    store, sleeps = dist.HashStore(), []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        time.sleep(seconds)

    alone = StoreConsensus(store, 0, 2, limit_seconds=0.02, sleep=sleep)
    for step in range(SKIPS_IN_A_ROW):
        assert not alone.off
        alone.exchange(step, [1.0], sums)
    assert alone.off
    assert alone.reason.startswith(f"{SKIPS_IN_A_ROW} samples in a row were skipped, the last because nothing came")
    waited = len(sleeps)
    assert alone.exchange(99, [1.0], sums).values is None
    assert len(sleeps) == waited
    late = StoreConsensus(store, 1, 2, limit_seconds=PATIENT)
    for step in range(SKIPS_IN_A_ROW):
        late.exchange(step, [1.0], sums)
    assert late.off


def test_a_skip_between_agreements_is_forgiven() -> None:
    store = dist.HashStore()
    ranks = [StoreConsensus(store, rank, 2, limit_seconds=0.1) for rank in range(2)]
    for step in range(0, 20, 4):
        for late in range(SKIPS_IN_A_ROW - 1):
            ranks[0].exchange(step + late, [1.0], sums)
            ranks[1].exchange(step + late, [1.0], sums)
        good = in_threads([lambda a=a, s=step + 3: a.exchange(s, [1.0], sums) for a in ranks])
        if any(v.values is None for v in good):
            pytest.skip("this machine was too slow for a tenth of a second")
    assert [a.off for a in ranks] == [False, False]
    assert [a.skipped for a in ranks] == [10, 10]


def test_the_store_does_not_grow() -> None:
    store = dist.HashStore()
    ranks = [StoreConsensus(store, rank, 3) for rank in range(3)]
    sizes = []
    for step in range(40):
        in_threads([lambda a=a, s=step: a.exchange(s, [1.0], sums) for a in ranks])
        sizes.append(store.num_keys())
    assert max(sizes[-10:]) <= 3 + 9 + 1
    assert sizes[-1] == sizes[20]


def test_numbers_that_do_not_fit_together_skip_the_sample_and_say_why() -> None:
    store = dist.HashStore()
    ranks = [StoreConsensus(store, rank, 2) for rank in range(2)]
    results = in_threads([lambda a=a: a.exchange(1, [1.0] * (a.rank + 1), sums) for a in ranks])
    assert results[0] == results[1]
    assert "give all ranks the same model and settings" in results[0].reason


class Broken:
    """A store whose host is gone."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def check(self, keys: list[str]) -> bool:
        if self.error is not None:
            raise self.error
        time.sleep(PATIENT)
        return False

    set = get = compare_set = delete_key = check


@pytest.mark.parametrize("error", [ConnectionResetError("peer"), None], ids=["gone", "hangs"])
def test_without_the_store_a_rank_skips_on_its_own_and_does_not_ask_again(error: Exception | None) -> None:
    agreement = StoreConsensus(Broken(error), 1, 2, limit_seconds=0.05)  # type: ignore[arg-type]
    started = time.monotonic()
    result = agreement.exchange(1, [1.0], sums)
    assert result.values is None
    assert "store cannot be reached" in result.reason
    assert agreement.off
    assert agreement.exchange(2, [1.0], sums).values is None
    assert time.monotonic() - started < PATIENT / 2


# -- processes --------------------------------------------------------------------------------------------------------


def join(kind: str, rank: int, world: int, folder: str) -> None:
    """Meet the other processes, over a TCP or a file store."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if kind == "file":
        dist.init_process_group("gloo", init_method=Path(folder, "meet").as_uri(), rank=rank, world_size=world)
        return
    port = Path(folder, "port")
    if rank == 0:
        server = dist.TCPStore("127.0.0.1", 0, world, True, wait_for_workers=False)
        Path(folder, "port.new").write_text(str(server.port))
        Path(folder, "port.new").rename(port)
    else:
        while not port.exists():
            time.sleep(0.01)
        server = dist.TCPStore("127.0.0.1", int(port.read_text()), world, False)
    dist.init_process_group("gloo", store=server, rank=rank, world_size=world)


def summed(value: float) -> float:
    tensor = torch.tensor([value])
    dist.all_reduce(tensor)
    return float(tensor)


def late_once(kind: str, rank: int, world: int, folder: str, results: Queue[Any]) -> None:
    join(kind, rank, world, folder)
    agreement = StoreConsensus.of_the_run(limit_seconds=1.0)
    second = StoreConsensus.of_the_run(limit_seconds=PATIENT)
    told = []
    for step in range(6):
        before = summed(rank + step)
        if step == 2 and rank == world - 1:
            time.sleep(2.5)
        result = agreement.exchange(step, [float(rank), step * 0.1], sums)
        told.append((before, result.values, result.reason, summed(1.0)))
    told.append(second.exchange(0, [1.0], sums).values)
    results.put((rank, told))
    dist.barrier()  # the host of the store stays until all have read


@pytest.mark.parametrize("kind", ["tcp", "file"])
def test_processes_agree_with_the_collectives_of_the_training_in_between_and_one_may_be_late(
    kind: str, tmp_path: Path
) -> None:
    told = of_processes(late_once, kind, 3, tmp_path)
    assert told[0] == told[1] == told[2]
    *steps, second = told[0]
    assert [values is None for _, values, _, _ in steps] == [False, False, True, False, False, False]
    assert steps[2][2] == "nothing came from rank 2 within 1 s of rank " + steps[2][2][-1]
    assert [values for _, values, _, _ in steps if values is not None] == [
        (3.0, sums([[s * 0.1]] * 3)[0]) for s in (0, 1, 3, 4, 5)
    ]
    assert [(a, b) for a, _, _, b in steps] == [(3.0 + 3 * step, 3.0) for step in range(6)]
    assert second == (3.0,)


def one_dies(kind: str, rank: int, world: int, folder: str, results: Queue[Any]) -> None:
    join(kind, rank, world, folder)
    agreement = StoreConsensus.of_the_run(limit_seconds=0.5)
    told = [agreement.exchange(0, [1.0], sums).values]
    if rank == 1:
        results.put((rank, told))
        results.close()
        results.join_thread()
        os.kill(os.getpid(), signal.SIGKILL)
    told += [agreement.exchange(step, [1.0], sums).values for step in range(1, 6)]
    results.put((rank, (told, agreement.off)))
    results.close()
    results.join_thread()
    # Not together: a rank that waits for the dead one would wait for ever.
    time.sleep(2.0 if rank == 0 else 0.0)
    os._exit(0)


def test_a_rank_that_is_killed_costs_the_others_a_few_limits_and_no_more(tmp_path: Path) -> None:
    told = of_processes(one_dies, "tcp", 3, tmp_path)
    assert told[1] == [(3.0,)]
    assert told[0] == told[2] == ([(3.0,)] + [None] * 5, True)


def host_dies(kind: str, rank: int, world: int, folder: str, results: Queue[Any]) -> None:
    join(kind, rank, world, folder)
    agreement = StoreConsensus.of_the_run(limit_seconds=0.5)
    told = [agreement.exchange(0, [1.0], sums).values]
    Path(folder, f"read-{rank}").touch()
    if rank == 0:
        results.put((rank, told))
        results.close()
        results.join_thread()
        while not all(Path(folder, f"read-{other}").exists() for other in range(world)):
            time.sleep(0.01)
        how = signal.SIGSTOP if kind == "stopped" else signal.SIGKILL
        os.kill(os.getpid(), how)
    time.sleep(0.5)
    started = time.monotonic()
    told += [agreement.exchange(step, [1.0], sums).values for step in range(1, 6)]
    results.put((rank, (told, agreement.off, time.monotonic() - started < PATIENT / 2)))
    results.close()
    results.join_thread()
    os._exit(0)


@pytest.mark.parametrize("kind", ["killed", "stopped"])
def test_when_the_host_of_the_store_is_gone_or_hangs_the_others_go_on(kind: str, tmp_path: Path) -> None:
    told = of_processes(host_dies, kind, 2, tmp_path)
    assert told[0] == [(2.0,)]
    assert told[1] == ([(2.0,)] + [None] * 5, True, True)


def of_processes(
    work: Callable[[str, int, int, str, Queue[Any]], None], kind: str, world: int, folder: Path
) -> dict[int, Any]:
    """What each rank tells. Ends all of them, also one that is stopped."""
    results: Queue[Any] = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=work, args=(kind, rank, world, str(folder), results), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        told: dict[int, Any] = {}
        while len(told) < world:
            rank, said = results.get(timeout=PATIENT)
            told[rank] = said
        return told
    finally:
        for process in processes:
            process.kill()
            process.join(PATIENT)


# -- the store --------------------------------------------------------------------------------------------------------


def test_the_store_of_a_run_is_another_connection_and_counts_monitors_and_restarts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        first, second = store_of_the_run(), store_of_the_run()
        first.set("a", "1")
        assert not second.check(["a"])
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert not store_of_the_run().check(["a"])
    finally:
        dist.destroy_process_group()


class Wrapped:
    """As a PrefixStore of a torch that cannot clone."""

    def __init__(self, store: Any) -> None:
        self.underlying_store = store


class Old(dist.TCPStore):
    @property
    def clone(self) -> Any:
        raise AttributeError


def test_where_a_store_cannot_be_cloned_its_server_is_asked_for_another_connection() -> None:
    server = Old("127.0.0.1", 0, None, True)
    mine = own_connection(Wrapped(Wrapped(server)))
    assert type(mine) is dist.TCPStore
    assert mine.port == server.port
    mine.set("a", "1")
    assert server.get("a") == b"1"
