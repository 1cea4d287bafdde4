"""Benchmarks that only people run still run: what they print is not looked at here, as it depends on the machine."""

from __future__ import annotations

import threading

from benchmarks import peers, sample_cost, worker


def test_the_cost_of_a_sample_counts_every_layer_once() -> None:
    row, _ = sample_cost.row_of("GLA, n 16")
    assert row["layers of a sample"] + row["left out"] == len(sample_cost.LAYERS) == 48
    assert row["MiB of all"] == 48 * 3 * 4 * 4 * 1024 * 16 * 4 / 2**20


def test_a_tool_is_compared_with_bare_steps_whether_it_works_or_stands_by() -> None:
    for tool in (peers.ess_monitor, peers.device_stats):
        standing_by, bare = peers.extra_seconds(tool, False, peers.Recall, 1, 1)
        working, _ = peers.extra_seconds(tool, True, peers.Recall, 1, 1)
        assert standing_by >= 0
        assert working > 0
        assert bare > 0


def test_the_worker_measures_until_it_is_told_to_end() -> None:
    active, reports = threading.Event(), []
    active.set()
    given = ("GLA, n 16", active, reports.append, lambda: len(reports) == 3)
    thread = threading.Thread(target=worker.work, args=given)  # whose number of threads it changes
    thread.start()
    thread.join(60)
    assert len(reports) == 3
