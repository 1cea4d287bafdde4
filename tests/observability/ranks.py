"""Two processes of one run, started as torchrun would start them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.exporters.helpers import free_port
from tests.programs import ROOT, Program

RUN_ID = "recall-7"


class Rank:
    """One process; a context that ends it."""

    def __init__(self, rank: int, world_size: int, port: int, targets: Path, folder: Path) -> None:
        stdin = folder / f"rank-{rank}.stdin"
        os.mkfifo(stdin)
        torchrun = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "TORCHELASTIC_RUN_ID": RUN_ID,
        }
        self._process = Program(
            ["-m", "tests.observability.training", str(targets), str(event_log(folder))],
            folder / f"rank-{rank}",
            imports=["pytorch_lightning"],
            cwd=ROOT,
            env={**os.environ, **torchrun},
            stdin=stdin,
        )
        self._stdin = stdin.open("w")

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def begin(self) -> None:
        """Let it train."""
        self._stdin.write("\n")
        self._stdin.flush()

    def kill(self) -> None:
        """As the kernel does when memory is out: no handler runs, nothing is tidied up."""
        self._process.kill()
        self._stdin.close()

    def still_running(self) -> bool:
        """True; False after a clean end.

        Raises:
            AssertionError: it ended with an error; the message has the end of its log.
        """
        status = self._process.poll()
        assert status in (None, 0), f"status {status}: {self._process.errors[-3000:]}"
        return status is None

    def wait(self, seconds: float) -> int:
        """The exit status."""
        return self._process.wait(seconds)


def event_log(folder: Path) -> Path:
    """Of the run: rank 0 writes it."""
    return folder / "events.jsonl"


@contextmanager
def two_ranks(targets: Path, folder: Path) -> Iterator[list[Rank]]:
    """Both processes, waiting for `begin`."""
    port = free_port()
    ranks = [Rank(rank, 2, port, targets, folder) for rank in range(2)]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
