"""Service discovery by file (`file_sd_configs`): one entry per process, as long as it can be scraped."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import weakref
from pathlib import Path

from ess_monitor.exporters.prometheus.atomic_file import replace_file
from ess_monitor.exporters.prometheus.identity import RunIdentity

_EVERYWHERE = ("", "0.0.0.0", "::")


class FileSdEntry:
    """The file `<run_id>-<rank>.json` with the address of one process.

    `job` is not in it: that is the name of the scrape configuration which reads the folder. The entry goes with
    `remove`, and at the latest when the interpreter ends. The entry of a process that was killed stays: Prometheus then
    shows the target as down, which it is.

    Args:
        folder: where Prometheus looks for `*.json`; made when it does not exist.
        identity: run and rank.
        target: `host:port` as Prometheus reaches it.
        scheme: "http" or "https".

    Raises:
        OSError: the entry cannot be written.
    """

    def __init__(self, folder: Path, identity: RunIdentity, target: str, scheme: str) -> None:
        self.path = folder / f"{identity.run_id}-{identity.rank}.json"
        labels = {**identity.labels, **({"__scheme__": scheme} if scheme != "http" else {})}
        data = (json.dumps([{"targets": [target], "labels": labels}], indent=2) + "\n").encode()
        replace_file(self.path, data)
        self._removal = weakref.finalize(self, _unlink, self.path.absolute(), data, os.getpid())

    def remove(self) -> None:
        """Take the entry away; a second call does nothing."""
        self._removal()


def advertised_target(host: str, port: int, advertise_host: str | None = None) -> str:
    """`host:port` for others; the machine's name where the endpoint listens on all addresses.

    >>> advertised_target("::1", 9464), advertised_target("0.0.0.0", 9464, "node7")
    ('[::1]:9464', 'node7:9464')
    """
    name = advertise_host or (socket.gethostname() if host in _EVERYWHERE else host)
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def _unlink(path: Path, data: bytes, process_id: int) -> None:
    if os.getpid() != process_id:
        return  # a forked child that ends must not take its parent's entry along
    with contextlib.suppress(OSError):
        if path.read_bytes() == data:  # by now it may be the entry of a later run with the same identifier
            path.unlink()
