"""The key-value store of a distributed run, which its processes met at, over a connection of our own.

The training's process groups use the store too, and a call that waits for a key holds its connection. With one of our
own neither side ever waits for the other's calls.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch.distributed

from ess_monitor.errors import ConfigError

dist: Any = torch.distributed
"""Its stubs do not export the stores."""


class Store(Protocol):
    """What is needed of `torch.distributed.Store`. TCPStore, FileStore, HashStore and PrefixStore have it."""

    def set(self, key: str, value: Any, /) -> None:
        """Set a key."""

    def get(self, key: str, /) -> bytes:
        """The value of a key; waits for one that is not there."""

    def check(self, keys: list[str], /) -> bool:
        """True when all keys are there; never waits for them."""

    def compare_set(self, key: str, expected: str, desired: Any, /) -> bytes:
        """Set a key that is not there yet (`expected` empty), in one go; the value it has afterwards."""

    def delete_key(self, key: str, /) -> bool:
        """Remove a key."""


def store_of_the_run() -> Store:
    """The default group's store, in a namespace that is this monitor's on all ranks.

    The namespace counts the monitors that this rank has built in the run, so that two in one process, or a second
    training, never read each other's keys. All ranks build theirs in the same order, so they count alike. The restarts
    of an elastic run are part of it, because torchrun keeps the store.

    Raises:
        ConfigError: the process group has no store (MPI), or it cannot be reached.
    """
    from torch.distributed import distributed_c10d

    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        shared = dist.PrefixStore(f"ess_monitor/{restarts}", own_connection(distributed_c10d._get_default_store()))
        built: int = shared.add(f"built/{dist.get_rank()}", 1)
    except Exception as error:
        raise ConfigError(
            f"distributed: the process group's store cannot be used ({type(error).__name__}: {error}), so the ranks "
            'cannot agree; set autopilot="advise" and distributed={"ranks": "zero"}'
        ) from error
    mine: Store = dist.PrefixStore(str(built), shared)
    return mine


def own_connection(store: Any) -> Any:
    """`store` over a connection of its own; the store itself where it is in memory or a file.

    The prefixes of a store that cannot be cloned (torch before 2.8 or so) are left out: our keys have their own.
    """
    if hasattr(store, "clone"):
        return store.clone()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        return dist.TCPStore(store.host, store.port, None, False, store.timeout, wait_for_workers=False)
    return store
