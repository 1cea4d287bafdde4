"""A file that others read while it is written: they see the old content or the new one, never a part."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` beside `path` and move it there; folders are made. Raises OSError, leaving nothing behind.

    The file gets the permissions of the process's umask: a temporary file of the standard library would be readable by
    its owner only, and its readers (Prometheus, node_exporter) run as somebody else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden and with another ending, so that neither `*.json` nor `*.prom` finds it.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
