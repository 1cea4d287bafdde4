"""The end of the interpreter, while threads of the monitor are still at work.

A daemon thread that comes back from torch's C++ code then cannot go on in Python; Python ends it, C++ takes that for an
error and aborts the process: exit status 134 after a run that went well. So the end of the interpreter closes the
monitors that nobody has closed, asks the threads that compute to stop, and waits for them, but not for ever.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from functools import cache
from typing import Protocol

from ess_monitor.records import RunStatus

logger = logging.getLogger("ess_monitor")


class Closeable(Protocol):
    """A monitor."""

    def close(self, status: RunStatus = "finished") -> None:
        """End it."""


SHUTDOWN_GRACE_SECONDS = 2.0
"""Seconds for which the end of the process waits for what may never return: a sink, a store, a worker that hangs."""

_OPEN: weakref.WeakSet[Closeable] = weakref.WeakSet()


class TorchThread(threading.Thread):
    """A daemon thread that calls torch, or code of others that may.

    Args:
        work: runs in it.
        name: of the thread.
        leave: asks `work` to return soon, and says for how many seconds its return is worth waiting for.
    """

    def __init__(self, work: Callable[[], None], name: str, leave: Callable[[], float]) -> None:
        _at_exit()
        super().__init__(target=work, name=name, daemon=True)
        self.leave = leave


def opened(monitor: Closeable) -> None:
    """Close it at the end of the interpreter, unless it has been closed by then."""
    _at_exit()
    _OPEN.add(monitor)


def closed(monitor: Closeable) -> None:
    """Nothing is left to do for it."""
    _OPEN.discard(monitor)


@cache
def _at_exit() -> None:
    """Once, when there is something to end: an import registers nothing."""
    atexit.register(_leave)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_OPEN.clear)  # they are the parent's


def _leave() -> None:
    for monitor in list(_OPEN):
        logger.warning("nobody closed the monitor: the run counts as failed. Call close() at its end, or use `with`.")
        try:
            monitor.close("failed")
        except Exception as error:
            logger.warning("the monitor could not be closed at the end of the process", exc_info=error)
    threads = [thread for thread in threading.enumerate() if isinstance(thread, TorchThread)]
    began = time.monotonic()
    for thread, seconds in [(thread, thread.leave()) for thread in threads]:
        thread.join(max(0.0, began + seconds - time.monotonic()))
