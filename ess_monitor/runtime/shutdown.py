"""Ends the monitor's threads before the interpreter ends.

A daemon thread that returns from torch's C++ code while the interpreter ends cannot go on in Python. Python ends it,
C++ takes that for an error and aborts the process: exit status 134 after a run that went well. So the end of the
interpreter closes the monitors that are still open, asks the threads that compute to stop, and waits for them for a
limited time.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from functools import cache
from typing import Protocol

from ess_monitor.records import RunStatus, Snapshot

logger = logging.getLogger("ess_monitor")

SHUTDOWN_GRACE_SECONDS = 2.0
"""Seconds for which the end of the process waits for what may never return: a sink, a store, a worker that hangs."""


class Closeable(Protocol):
    """Ends a run when it is closed, as a monitor does."""

    @property
    def exporters(self) -> Iterable[object]:
        """The sinks in use."""

    def snapshot(self) -> Snapshot:
        """Return all counters at this moment."""

    def close(self, status: RunStatus = "finished") -> None:
        """End the run with `status`."""


_OPEN: weakref.WeakKeyDictionary[Closeable, int] = weakref.WeakKeyDictionary()
"""The monitors that run, with the thread that started each."""


class TorchThread(threading.Thread):
    """Runs work that calls torch, or code of others that may, on a daemon thread.

    Args:
        work: runs on the thread.
        name: of the thread.
        request_stop: asks `work` to return soon; returns for how many seconds its return is worth waiting.
    """

    def __init__(self, work: Callable[[], None], name: str, request_stop: Callable[[], float]) -> None:
        _register()
        super().__init__(target=work, name=name, daemon=True)
        self.request_stop = request_stop


def close_at_exit(monitor: Closeable) -> None:
    """Close `monitor` as failed at the end of the interpreter, unless `forget` is called first."""
    _register()
    _OPEN[monitor] = threading.get_ident()


def forget(monitor: Closeable) -> None:
    """Undo `close_at_exit`."""
    _OPEN.pop(monitor, None)


def close_abandoned(is_in_the_way: Callable[[Closeable], bool], needed: str) -> bool:
    """Close the monitors that are in the way of another one that begins, if their training is over.

    It is over where the monitor was started in this thread and has made steps: a notebook's cell that was interrupted
    runs again. Two monitors that are to run side by side are both started before the first step.

    Args:
        is_in_the_way: whether a monitor is.
        needed: what the other one needs of it, in a word.

    Returns:
        Whether one was closed.
    """
    closed = False
    for monitor, thread in list(_OPEN.items()):
        is_over = thread == threading.get_ident() and monitor.snapshot().of_process.steps_total > 0
        if is_over and is_in_the_way(monitor):
            logger.warning(
                "a monitor of this process was never closed, and another one needs its %s: it is closed now, and its "
                "run counts as failed. Call close() at the end of a run, or use `with`.",
                needed,
            )
            monitor.close("failed")
            closed = True
    return closed


@cache
def _register() -> None:
    """Register the handlers once, at the first use: an import registers nothing."""
    atexit.register(_shut_down)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_OPEN.clear)  # the monitors belong to the parent


def _shut_down() -> None:
    for monitor in list(_OPEN):
        if monitor.snapshot().status != "terminated":
            logger.warning(
                "the monitor was never closed: the run counts as failed. Call close() at its end, or use `with`."
            )
        try:
            monitor.close("failed")
        except Exception as error:
            logger.warning("the monitor could not be closed at the end of the process", exc_info=error)
    threads = [thread for thread in threading.enumerate() if isinstance(thread, TorchThread)]
    started = time.monotonic()
    # All are asked to stop before the first is waited for.
    for thread, seconds in [(thread, thread.request_stop()) for thread in threads]:
        thread.join(max(0.0, started + seconds - time.monotonic()))
