"""A file of lines that is only ever appended to, and stays readable after a write that failed half way.

Several processes may write to one: each follows when another has renamed the file to begin a new one.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_WINDOWS = os.name == "nt"


class LineFile:
    """Appends whole lines, unbuffered, so that nothing is lost or written twice when the process dies or forks.

    Args:
        path: the file; parent folders are made by `open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        """Bytes in the file, as of the last write; other processes may have written since."""
        self._file: io.FileIO | None = None
        self._identity = (0, 0)
        self._torn = False

    def open(self) -> None:
        """Open what is at the path for appending, and close what was open. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = io.FileIO(self.path, "ab")
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
            line: is not lost when another process has renamed or removed the file since the last one.
            max_bytes: a file that would become larger is rotated before.
            heading: makes the line that comes first where this file was not written to before.

        Raises:
            OSError: the disk does not take all of it, or the rotation failed.
        """
        if self._file is None:
            raise OSError(f"{self.path} is not open")
        another = self._follow()
        if max_bytes is not None and self.size + len(line) > max_bytes:
            another = self.rotate() or another
        if another and heading is not None:
            self._append(heading())
        self._append(line)

    def rotate(self) -> bool:
        """Rename the file to `<name>.1`, replacing an older one, and begin a new one.

        Of several processes that are about to, one does; the others go on in its new file.

        Returns:
            Whether another file is open now: not while another process is just renaming this one.

        Raises:
            OSError: where only the renaming failed the file stays open, so that a later attempt may succeed.
        """
        file = self._file
        if file is None:
            raise OSError(f"{self.path} is not open")
        if not _lock(file):
            return False
        try:
            if self._is_at_path():
                if _WINDOWS:
                    file.close()  # it renames no file that is open
                os.replace(self.path, rotated_path(self.path))
        finally:
            _unlock(file)
            self.open()
        return True

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _follow(self) -> bool:
        """Open the file at the path if that is another one by now; whether it was."""
        if self._is_at_path():
            return False
        self.open()
        return True

    def _is_at_path(self) -> bool:
        """Whether the open file is the one at the path, whose size is taken over."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return False
        except OSError:
            return True  # a folder that may not be looked into any more: what is open can still be written
        if _identity(found) != self._identity:
            return False
        self.size = found.st_size
        return True

    def _append(self, line: bytes) -> None:
        if self._file is None:
            raise OSError(f"{self.path} is not open")
        data = b"\n" + line if self._torn else line
        # Until the write has succeeded the file may end inside a line.
        self._torn = True
        written = self._file.write(data) or 0
        self.size += written
        if written < len(data):
            raise OSError(f"{self.path}: only {written} of {len(data)} bytes were written; is the disk full?")
        self._torn = False


def rotated_path(path: Path) -> Path:
    """Where the older part of a rotated file lies.

    >>> rotated_path(Path("runs/events.jsonl")).name
    'events.jsonl.1'
    """
    return path.with_name(path.name + ".1")


def _ends_with_newline(path: Path, size: int) -> bool:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # renamed in this moment, by another process
        file.seek(size - 1)
        return file.read(1) in (b"\n", b"")
    return True


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _lock(file: io.FileIO) -> bool:
    """Be the only process that renames this file; False while another one does."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True  # a file system without locks
    return True


def _unlock(file: io.FileIO) -> None:
    """Not left to closing the file, which a forked process may have open too."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
