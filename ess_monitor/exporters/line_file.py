"""A file of lines that is only ever appended to, and stays readable after a write that failed half way."""

from __future__ import annotations

import io
import os
from pathlib import Path


class LineFile:
    """Appends whole lines, unbuffered, so that nothing is lost or written twice when the process dies or forks.

    Args:
        path: the file; parent folders are made by `open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        """Bytes in the file."""
        self._file: io.FileIO | None = None
        self._torn = False

    def open(self) -> None:
        """Open for appending. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = io.FileIO(self.path, "ab")
        self.size = os.fstat(self._file.fileno()).st_size
        self._torn = self.size > 0 and not _ends_with_newline(self.path)

    def write(self, line: bytes) -> None:
        """Append one line, its newline included. Raises OSError when the disk does not take all of it."""
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

    def rotate(self) -> None:
        """Rename the file to `<name>.1`, replacing an older one, and begin a new one.

        Raises OSError; where only the renaming failed the file stays open, so that a later attempt may succeed.
        """
        self.close()
        try:
            os.replace(self.path, rotated_path(self.path))
        finally:
            self.open()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None


def rotated_path(path: Path) -> Path:
    """Where the older part of a rotated file lies.

    >>> rotated_path(Path("runs/events.jsonl")).name
    'events.jsonl.1'
    """
    return path.with_name(path.name + ".1")


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
