"""Measures bytes and time of one exchange between ranks, and computes the cost for a thousand ranks and more.

The exchange goes through the store of the process group, over TCP. Here all processes share one machine, so the time is
mostly spent waiting for a processor; the bytes are exact. Before every exchange the ranks synchronize in a collective,
as in a training.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist
from prometheus_client import CollectorRegistry, generate_latest

from benchmarks.report import Result, main
from ess_monitor.distributed.config import measuring_ranks
from ess_monitor.distributed.consensus import StoreConsensus
from ess_monitor.distributed.reduction import RankReduction
from ess_monitor.exporters.prometheus.collector import SnapshotCollector
from ess_monitor.pipeline.counters import RunCounters
from ess_monitor.records import LayerInfo, Reading, RunInfo, SampleResult

WORLDS = (2, 4, 8)
LAYERS = 48
EXCHANGES, WARMUP = 60, 5
MAX_POST_BYTES = 4096
"""Bytes that one rank may write: 48 layers of seven numbers are 2.7 kB."""
SCRAPE_SECONDS = 15
RANKS_OF_A_MACHINE = 8
LARGE = (
    (1_000, "all", "all"),
    (1_000, None, "local_zero"),
    (1_000, None, "zero"),
    (10_000, "all", "all"),
    (10_000, None, "local_zero"),
    (10_000, None, "zero"),
)
"""World size, `distributed.ranks` in mode auto, and `ranks` of the Prometheus exporter."""


class Counted:
    """A store that counts what one process sends and receives, keys and values, without the protocol's headers."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.posted = self.read = self.calls = 0

    def _call(self, name: str, sent: int, *arguments: Any) -> Any:
        self.calls += 1
        self.posted += sent
        result = getattr(self._store, name)(*arguments)
        self.read += len(result) if isinstance(result, bytes) else 1
        return result

    def set(self, key: str, value: bytes) -> None:
        self._call("set", len(key) + len(value), key, value)

    def get(self, key: str) -> bytes:
        value: bytes = self._call("get", len(key), key)
        return value

    def check(self, keys: list[str]) -> bool:
        return bool(self._call("check", sum(map(len, keys)), keys))

    def compare_set(self, key: str, expected: str, desired: bytes) -> bytes:
        value: bytes = self._call("compare_set", len(key) + len(desired), key, expected, desired)
        return value

    def delete_key(self, key: str) -> bool:
        return bool(self._call("delete_key", len(key), key))


def sample_result(step: int, rank: int) -> SampleResult:
    """Return a sample of 48 layers."""
    use = 0.5 + 0.01 * rank
    readings = tuple(
        Reading(
            step=step,
            layer=f"model.blocks.{k}.mixer",
            status="ok",
            state_capacity=64.0,
            attainable_size=64.0,
            effective_size=64.0 * use,
            entropy_size=30.0,
            utilization_ratio=use,
            retention_ratio=0.9,
            mean_decay=0.97,
            far_share_ratio=0.25,
        )
        for k in range(LAYERS)
    )
    return SampleResult(step, readings, {"loss": 1.0, "accuracy": 0.5})


def reduction_of(ranks: Sequence[int]) -> RankReduction:
    """Return the reduction for those layers and two metrics."""
    return RankReduction([f"model.blocks.{k}.mixer" for k in range(LAYERS)], ["loss", "accuracy"], ranks)


def one_rank(rank: int, world: int, port: int, results: Any) -> None:
    """Run all exchanges on one rank; put the bytes and seconds of each into `results`."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    server = dist.TCPStore("127.0.0.1", port, None, False)
    dist.init_process_group("gloo", store=dist.PrefixStore("training", server), rank=rank, world_size=world)
    store = Counted(dist.PrefixStore("monitor", server).clone())
    consensus, reduction = StoreConsensus(store, rank, world, limit_seconds=60), reduction_of(range(world))
    seconds, posted, read, calls = [], [], [], []
    for step in range(WARMUP + EXCHANGES):
        values = reduction.encode(sample_result(step, rank), 100)
        before = store.posted, store.read, store.calls
        dist.barrier()
        started = time.perf_counter()
        agreed = consensus.exchange(step, values, reduction.reduce)
        taken = time.perf_counter() - started
        assert agreed.values is not None
        if step >= WARMUP:
            seconds.append(taken)
            for numbers, now, then in zip(
                (posted, read, calls), (store.posted, store.read, store.calls), before, strict=True
            ):
                numbers.append(now - then)
    results.put((rank, seconds, posted, read, calls))
    dist.barrier()
    dist.destroy_process_group()


def measured() -> Result:
    """Measure the exchange between 2, 4 and 8 processes on this machine."""
    context = get_context("spawn")
    rows, failures = [], []
    post = 8 * len(reduction_of((0,)).encode(sample_result(0, 0), 100))
    for world in WORLDS:
        server = dist.TCPStore("127.0.0.1", 0, None, True)
        queue = context.Queue()
        processes = [context.Process(target=one_rank, args=(r, world, server.port, queue)) for r in range(world)]
        for process in processes:
            process.start()
        ranks = {rank: rest for rank, *rest in (queue.get(timeout=300) for _ in range(world))}
        for process in processes:
            process.join(60)
        everyone = [s for seconds, *_ in ranks.values() for s in seconds]
        others = [ranks[r] for r in range(1, world)]
        rows.append(
            {
                "ranks": world,
                "rank 0 posts, bytes": statistics.median(ranks[0][1]),
                "rank 0 reads, bytes": statistics.median(ranks[0][2]),
                "others post, bytes": statistics.median(n for other in others for n in other[1]),
                "others read, bytes": statistics.median(n for other in others for n in other[2]),
                "calls of a rank": statistics.median(n for rank in ranks.values() for n in rank[3]),
                "median ms": 1e3 * statistics.median(everyone),
                "worst ms": 1e3 * max(everyone),
            }
        )
    if post > MAX_POST_BYTES:
        failures.append(f"a rank writes {post} bytes, target at most {MAX_POST_BYTES}")
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Result(
        f"One exchange of {LAYERS} layers and 2 metrics, {EXCHANGES} times, {processors} processors for all ranks",
        rows,
        [f"a rank writes {post} bytes of numbers, the result has {8 * agreed_numbers()}; keys are extra"],
        failures,
    )


def agreed_numbers() -> int:
    """How many numbers all ranks read."""
    reduction = reduction_of((0, 1))
    return len(reduction.reduce([reduction.encode(sample_result(0, rank), 100) for rank in (0, 1)]))


def scrape() -> tuple[int, int]:
    """Series and bytes of one endpoint after an agreed measurement."""
    reduction = reduction_of((0, 1))
    agreed, _ = reduction.decode(
        sample_result(0, 0),
        reduction.reduce([reduction.encode(sample_result(0, rank), 100) for rank in (0, 1)]),
    )
    names = [reading.layer for reading in agreed.readings]
    counters = RunCounters(names)
    counters.measured("ok", agreed.readings)
    layers = tuple(LayerInfo(name=name, module="GLA", supported=True) for name in names)
    registry = CollectorRegistry()
    registry.register(SnapshotCollector(RunInfo(run_name="run", model="Model", layers=layers), counters.snapshot))
    text = generate_latest(registry)
    return sum(not line.startswith(b"#") for line in text.splitlines()), len(text)


def computed() -> Result:
    """From the bytes of one exchange to a thousand ranks and more."""
    post, agreed_bytes = 8 * len(reduction_of((0,)).encode(sample_result(0, 0), 100)), 8 * agreed_numbers()
    series, size = scrape()
    rows = []
    for world, ranks, exporting in LARGE:
        measuring = len(measuring_ranks(ranks, world, acts=True))
        endpoints = {"all": world, "local_zero": world // RANKS_OF_A_MACHINE, "zero": 1}[exporting]
        rows.append(
            {
                "ranks": world,
                "distributed.ranks": "default" if ranks is None else str(ranks),
                "measure": measuring,
                "bytes in, at the store": f"{measuring * post / 1e6:.2f} MB",
                "out": f"{(measuring * post + world * agreed_bytes) / 1e6:.1f} MB",
                "exporter's ranks": exporting,
                "endpoints": endpoints,
                "series": endpoints * series,
                "scraped": f"{endpoints * size / SCRAPE_SECONDS / 1e6:.3g} MB/s",
            }
        )
    return Result(
        f"Large runs, computed: one exchange of {LAYERS} layers in mode auto; Prometheus every {SCRAPE_SECONDS} s",
        rows,
        [
            f"out: numbers to rank 0, results to all ranks; {series} series and {size} bytes a scrape, uncompressed; "
            f"{RANKS_OF_A_MACHINE} ranks per machine"
        ],
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main([measured, computed], __doc__))
