"""Opens a separate connection to the key-value store that the processes of a run met at.

The training's process groups use the store too, and a call that waits for a key blocks its connection. With two
connections neither side ever waits for the other's calls.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch.distributed

from ess_monitor.errors import ConfigError, format_error

dist: Any = torch.distributed
"""Untyped, because the stubs do not export the stores."""


class Store(Protocol):
    """Has the methods of `torch.distributed.Store` that are used; all of torch's stores have them."""

    def set(self, key: str, value: Any, /) -> None:
        """Set a key."""

    def get(self, key: str, /) -> bytes:
        """Return the value of a key; wait for the key if it is missing."""

    def check(self, keys: list[str], /) -> bool:
        """Return whether all keys exist, without waiting."""

    def compare_set(self, key: str, expected: str, desired: Any, /) -> bytes:
        """Set a key atomically if it is missing (`expected` is empty); return its value afterwards."""

    def delete_key(self, key: str, /) -> bool:
        """Remove a key."""


def store_of_the_run() -> Store:
    """Return the default group's store, in a namespace that only this monitor uses, on all ranks.

    The namespace counts the monitors that this rank has built in the run, so that two monitors in one process never
    read each other's keys. All ranks build theirs in the same order, so the counts agree. The number of restarts of an
    elastic run is part of the namespace, because torchrun keeps the store.

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
            f"distributed: the process group's store cannot be used ({format_error(error)}), so the ranks "
            'cannot agree; set autopilot="advise" and distributed={"ranks": "zero"}'
        ) from error
    mine: Store = dist.PrefixStore(str(built), shared)
    return mine


def own_connection(store: Any) -> Any:
    """Return `store` over a new connection, or the store itself where it is in memory or a file.

    A store that cannot be cloned (torch before about 2.8) loses its prefixes, which is harmless: our keys have one.
    """
    if hasattr(store, "clone"):
        return store.clone()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        return dist.TCPStore(store.host, store.port, None, False, store.timeout, wait_for_workers=False)
    return store
