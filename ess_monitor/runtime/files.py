"""Writes files as a whole, and says what a path is that cannot be written as a file."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def target_of(path: Path) -> Path:
    """Return what a symbolic link leads to, at the end of a chain of them; any other path as it is."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def require_regular(path: Path) -> int | None:
    """Return the permission bits of the file that a path names or leads to; None where there is none yet.

    Opening a pipe blocks until another process reads it, and replacing a device takes it away from all programs.

    Raises:
        OSError: there is something else, or a chain of links that does not end.

    Examples:
        >>> require_regular(Path("/dev/null"))
        Traceback (most recent call last):
        ...
        OSError: [Errno 22] is a device, not a file: '/dev/null'
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, f"is {kind}, not a file", str(path))
    return stat.S_IMODE(mode)


def require_writable(path: Path) -> None:
    """Check that a file can be put at a path, with the folders that are missing. Nothing is written.

    Raises:
        OSError: it cannot.
    """
    require_regular(path)
    folder = target_of(path).absolute().parent
    while not folder.exists():
        folder = folder.parent
    code = errno.ENOTDIR if not folder.is_dir() else 0 if os.access(folder, os.W_OK | os.X_OK) else errno.EACCES
    if code:
        raise OSError(code, os.strerror(code), str(folder))


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file as a whole, so that its readers see the old content or the new one, never a part.

    Missing folders are created. Of a link the file that it leads to is replaced. A file keeps its permissions; those of
    a new one are of the process's umask: the standard library's temporary files are readable by their owner only, and
    the readers (Prometheus, node_exporter) run as other users.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    mode, path = require_regular(path), target_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # neither `*.json` nor `*.prom` matches it
    try:
        temporary.unlink(missing_ok=True)  # of a killed process, or a link that somebody else has put there
        temporary.write_bytes(data)
        if mode is not None:
            temporary.chmod(mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def is_same_file(path: Path, other: Path) -> bool:
    """Return whether two paths name one file, by whatever spelling, symbolic or hard link; False where one is missing.

    >>> is_same_file(Path("."), Path("../") / Path.cwd().name), is_same_file(Path("missing"), Path("missing"))
    (True, False)
    """
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):
        return False
