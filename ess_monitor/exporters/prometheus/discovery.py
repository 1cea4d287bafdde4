"""Announces a process to Prometheus by a file (`file_sd_configs`), as long as it can be scraped."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import weakref
from collections.abc import Callable
from pathlib import Path

from ess_monitor.exporters.prometheus.identity import RunIdentity
from ess_monitor.runtime.files import replace_file

_ALL_ADDRESSES = ("", "0.0.0.0", "::")


def announce(folder: Path, identity: RunIdentity, target: str, scheme: str, endpoint: object) -> Callable[[], object]:
    """Write the file `<run_id>-<rank>.json` with the address of one process, and return what removes it.

    The file has no `job`: that is the name of the scrape configuration which reads the folder. It is also removed when
    the endpoint is freed or the interpreter ends. The file of a killed process stays, and Prometheus shows its target
    as down.

    Args:
        folder: where Prometheus looks for `*.json`; created if it is missing.
        identity: run and rank.
        target: `host:port` as Prometheus reaches it.
        scheme: "http" or "https".
        endpoint: what listens there.

    Raises:
        OSError: the file cannot be written.
    """
    path = folder / f"{identity.run_id}-{identity.rank}.json"
    labels = {**identity.labels, **({"__scheme__": scheme} if scheme != "http" else {})}
    data = (json.dumps([{"targets": [target], "labels": labels}], indent=2) + "\n").encode()
    replace_file(path, data)
    return weakref.finalize(endpoint, _unlink, path.absolute(), data, os.getpid())


def advertised_target(host: str, port: int, advertise_host: str | None = None) -> str:
    """Return `host:port` for other machines; with the machine's name if the endpoint listens on all addresses.

    >>> advertised_target("::1", 9464), advertised_target("0.0.0.0", 9464, "node7")
    ('[::1]:9464', 'node7:9464')
    """
    name = advertise_host or (socket.gethostname() if host in _ALL_ADDRESSES else host)
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def _unlink(path: Path, data: bytes, process_id: int) -> None:
    if os.getpid() != process_id:
        return  # a forked child that ends must not remove its parent's file
    with contextlib.suppress(OSError):
        if path.read_bytes() == data:  # a later run with the same identifier may have replaced it
            path.unlink()
