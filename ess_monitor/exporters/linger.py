"""Staying a little after the end, without anybody waiting for it."""

from __future__ import annotations

import threading
from collections.abc import Callable

_lock = threading.Lock()
_lingering: dict[int, Linger] = {}
"""By port. A port belongs to the process, not to an object: a second run in this process must be able to have it."""


class Linger:
    """Calls `stop` after `seconds`, from a daemon thread, or at once when somebody else needs the port.

    The thread does not keep the interpreter alive: a process that ends takes it along.
    """

    def __init__(self, port: int, seconds: float, stop: Callable[[], None]) -> None:
        self._port = port
        self._stop = stop
        self._timer = threading.Timer(seconds, self.end_now)
        self._timer.name = "ess-monitor-linger"
        self._timer.daemon = True
        with _lock:
            _lingering[port] = self
        self._timer.start()

    def cancel(self) -> None:
        """Forget about it; `stop` is not called."""
        self._timer.cancel()
        with _lock:
            if _lingering.get(self._port) is self:
                del _lingering[self._port]

    def end_now(self) -> None:
        """Call `stop` now instead of later."""
        self.cancel()
        self._stop()


def make_way(port: int) -> bool:
    """End whatever lingers on this port in this process; True when there was something."""
    with _lock:
        lingering = _lingering.get(port)
    if lingering is None:
        return False
    lingering.end_now()
    return True
