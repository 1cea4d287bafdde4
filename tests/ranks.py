"""Ranks as processes of their own, which save what they saw."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def saved_by_ranks(observe: Callable[[int, str], None], folder: Path, count: int, seconds: float) -> list[Any]:
    """What each rank has left in `folder/<rank>.pt`. Nothing of them stays behind.

    Args:
        observe: `(rank, folder)`; runs in each process.
        folder: empty.
        count: of ranks.
        seconds: after which they are killed, and the test fails.
    """
    processes = mp.start_processes(observe, (str(folder),), count, join=False, start_method="spawn")
    ends = time.monotonic() + seconds
    try:
        while not processes.join(timeout=5):
            assert time.monotonic() < ends, "the ranks did not end"
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]
