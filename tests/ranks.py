"""Ranks as processes of their own, which save what they saw.

They are forked from a server that has imported torch and the libraries once. And they leave without the end of the
interpreter, in which a thread of gloo's that still holds a tensor of Python's aborts the process now and then, with and
without a monitor (https://github.com/pytorch/pytorch/issues/190489).
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT: Any = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":
    CONTEXT.set_forkserver_preload(
        ["pytest", "torch.distributed.fsdp", "ess_monitor.featurizers", "transformers.trainer", "accelerate"]
    )


def run_ranks(work: Callable[..., None], count: int, *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in `count` processes, for a minute at most. Nothing of them stays behind.

    Args:
        work: can be imported by its name.
        count: of ranks.
        arguments: can be pickled.
    """
    processes = mp.start_processes(work, arguments, count, join=False, start_method=METHOD)
    ends = time.monotonic() + 60
    try:
        while not processes.join(timeout=5):
            assert time.monotonic() < ends, "the ranks did not end"
    finally:
        for process in processes.processes:
            process.kill()


def saved_by_ranks(work: Callable[..., None], folder: Path, count: int, *arguments: Any) -> list[Any]:
    """What each rank has left in `folder/<rank>.pt`, run as `work(rank, folder, *arguments)`."""
    run_ranks(work, count, str(folder), *arguments)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]
