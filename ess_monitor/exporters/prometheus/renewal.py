"""Reads certificates and secrets again when their files are renewed, as happens in a run of weeks."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

from ess_monitor.errors import format_error

logger = logging.getLogger("ess_monitor.exporters")

T = TypeVar("T")


class Renewed(Generic[T]):
    """Holds what was made from files; a call makes it again if one of them has changed, and returns it.

    What cannot be made from the new files is logged once, and what was made from the old ones stays. A call never waits
    for another one: a file system that hangs holds up one thread.

    Args:
        what: name in log lines, for example "prometheus.certfile". Never a secret.
        files: the files; None is none.
        make: makes it. Its errors are logged, so they must not quote a secret.

    Raises:
        Exception: what `make` raises at the first time.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "token")
        ...     _ = path.write_text("old")
        ...     token = Renewed("the token", [path], path.read_text)
        ...     _ = path.write_text("renewed")
        ...     token()
        'renewed'
    """

    def __init__(self, what: str, files: Iterable[Path | None], make: Callable[[], T]) -> None:
        self._what, self._make = what, make
        self._files = tuple(file for file in files if file is not None)
        self._lock = threading.Lock()
        self._state = self._look()  # before they are read: a change while they are read is seen at the next call
        self._made = make()
        self._has_failed = False

    def __call__(self) -> T:
        """Return it, of the newest files that could be used."""
        if self._files and self._lock.acquire(blocking=False):
            try:
                self._renew()
            finally:
                self._lock.release()
        return self._made

    def _renew(self) -> None:
        state = self._look()
        if state == self._state and not self._has_failed:
            return
        self._state = state
        try:
            self._made = self._make()
        except Exception as error:
            if not self._has_failed:
                logger.warning(
                    "%s has changed and cannot be used: %s The one from before is used on, until it can.",
                    self._what,
                    format_error(error),
                )
            self._has_failed = True
        else:
            self._has_failed = False
            logger.info("%s has changed, and the new one is used from now on", self._what)

    def _look(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(map(_state_of, self._files))


def _state_of(file: Path) -> tuple[int, ...] | None:
    """Return what changes with the file: a new one in its place (also behind a link), its content, its permissions."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
