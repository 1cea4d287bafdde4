"""Appends lines to a file that rotates and stays readable after a failed write.

Several processes may write to one file: each follows when another has renamed it and begun a new one.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path

from ess_monitor.runtime.files import target_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_WINDOWS = os.name == "nt"


class LineFile:
    """Appends whole lines, unbuffered, so that nothing is lost or written twice when the process dies or forks.

    Args:
        path: the file; `open` creates missing folders.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        """Bytes in the file, as of the last write; other processes may have written since."""
        self._file: io.FileIO | None = None
        self._identity = (0, 0)
        self._torn = False

    def open(self) -> None:
        """Open the file at the path, or that a link there leads to, for appending, and close the previous one.

        Raises:
            OSError: it cannot be opened; a pipe without a reader is not waited for.
        """
        target_of(self.path).parent.mkdir(parents=True, exist_ok=True)
        file = io.FileIO(self.path, "ab", opener=_open_without_waiting)
        try:
            found = os.fstat(file.fileno())
            torn = found.st_size > 0 and not _ends_with_newline(self.path, found.st_size)
        except OSError:
            file.close()
            raise
        self.close()
        self._file, self._identity, self.size, self._torn = file, _identity(found), found.st_size, torn

    def write(self, line: bytes, *, max_bytes: int | None = None, heading: Callable[[], bytes] | None = None) -> None:
        """Append one line, its newline included, to the file that is at the path now.

        Args:
            line: is kept even if another process has renamed or removed the file since the last line.
            max_bytes: a file that would become larger, its heading included, is rotated first, unless it is empty.
            heading: makes the first line that this object writes to a new file.

        Raises:
            OSError: the line cannot be written as a whole, or the rotation failed.
        """
        self._opened()
        is_new = not self._is_at_path()
        if is_new:
            self.open()
        needed = len(line) + (len(heading()) if is_new and heading is not None else 0)
        if max_bytes is not None and self.size and self.size + needed > max_bytes:
            is_new = self.rotate() or is_new
        if is_new and heading is not None:
            self._append(heading())
        self._append(line)

    def rotate(self) -> bool:
        """Rename the file to `<name>.1`, replacing an older one, and begin a new one. Of a link the target is renamed.

        Of several processes that try at once, one does it; the others go on in its new file.

        Returns:
            Whether another file is open now; False while another process is renaming this one.

        Raises:
            OSError: the file stays open if only the renaming failed, so that a later attempt may succeed.
        """
        file = self._opened()
        if not _lock(file):
            return False
        try:
            if self._is_at_path():
                if _WINDOWS:
                    file.close()  # Windows does not rename an open file
                os.replace(target_of(self.path), rotated_path(self.path))
        finally:
            _unlock(file)
            self.open()
        return True

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> io.FileIO:
        if self._file is None:
            raise OSError(f"{self.path} is not open")
        return self._file

    def _is_at_path(self) -> bool:
        """Return whether the open file is the one at the path, and update its size."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return False
        except OSError:
            return True  # the folder cannot be read any more, but the open file can still be written
        if _identity(found) != self._identity:
            return False
        self.size = found.st_size
        return True

    def _append(self, line: bytes) -> None:
        data = b"\n" + line if self._torn else line
        # Until the write has succeeded the file may end inside a line.
        self._torn = True
        written = self._opened().write(data) or 0
        self.size += written
        if written < len(data):
            raise OSError(f"{self.path}: only {written} of {len(data)} bytes were written; is the disk full?")
        self._torn = False


def rotated_path(path: Path) -> Path:
    """Return the path of the older part of a rotated file. That of a link is beside the file that it leads to.

    >>> rotated_path(Path("runs/events.jsonl")).name
    'events.jsonl.1'
    """
    path = target_of(path)
    return path.with_name(path.name + ".1")


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)


def _ends_with_newline(path: Path, size: int) -> bool:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # another process may just rename it
        file.seek(size - 1)
        return file.read(1) in (b"\n", b"")
    return True


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _lock(file: io.FileIO) -> bool:
    """Reserve the renaming of this file; return False while another process holds it."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True  # the file system has no locks
    return True


def _unlock(file: io.FileIO) -> None:
    """Release the lock. Closing the file is not enough: a forked process may have it open too."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
