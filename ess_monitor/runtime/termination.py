"""Ends the runs of this process in their sinks when SIGTERM tells it to end, as schedulers do.

Python calls a signal handler on the main thread, between any two of its instructions: that thread may be inside a step,
or hold a lock that a sink needs. So the handler only starts a thread, and the training goes on. The thread ends the
runs and sends the signal again. This time the handler does what would have been done without it: it calls the handler
from before or, where there was none, lets the signal end the process.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from types import FrameType
from typing import Any

from ess_monitor.errors import format_error

logger = logging.getLogger("ess_monitor")

SCHEDULER_VARIABLES = (
    "SLURM_JOB_ID",
    "KUBERNETES_SERVICE_HOST",
    "LSB_JOBID",
    "PBS_JOBID",
    "SGE_O_HOST",
    "COBALT_JOBID",
    "FLUX_JOB_ID",
    "OAR_JOB_ID",
    "_CONDOR_JOB_AD",
    "NOMAD_ALLOC_ID",
    "ECS_CONTAINER_METADATA_URI_V4",
    "AWS_BATCH_JOB_ID",
    "TRAINING_JOB_NAME",
    "CLOUD_ML_JOB_ID",
    "AZUREML_RUN_ID",
    "TORCHELASTIC_RUN_ID",
)
"""Environment variables of those who end their jobs by SIGTERM: Slurm, Kubernetes, LSF, PBS and Torque, Grid Engine,
Cobalt, Flux, OAR, HTCondor, Nomad, ECS, AWS Batch, SageMaker, Vertex AI, Azure ML, torchrun."""

_END_SECONDS = 10.0
"""Seconds that all sinks have. Each with a queue has five; one that is called on the training's thread has no limit of
its own."""
_CHAINED_SECONDS = 6.0
"""Seconds for which another handler that calls this one waits for the sinks: it may end the process."""
_NAME = "ess-monitor-sigterm"

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 5.0
"""Seconds until the signal is sent again to a main thread that has not noticed it."""

_Previous = Callable[[int, FrameType | None], Any] | int | None

_runs: list[weakref.WeakMethod[Callable[[], None]]] = []
"""What ends each run that goes on."""
_is_ending = False
"""Whether a thread ends runs now. A signal that comes meanwhile is the same one, as for the kernel while one waits."""


def under_scheduler(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether a scheduler or launcher that ends jobs by SIGTERM has started this process.

    >>> under_scheduler({"SLURM_JOB_ID": "4711"}), under_scheduler({})
    (True, False)
    """
    return any(environ.get(name) for name in SCHEDULER_VARIABLES)


def watch(end: Callable[[], None], wanted: bool | None) -> None:
    """Call the bound method `end` at SIGTERM, on a thread of its own, until `forget`.

    Args:
        end: ends a run in its sinks, within some seconds. Only weakly held.
        wanted: False does nothing; None does nothing unless a scheduler has started this process.
    """
    if os.name != "posix" or not (under_scheduler() if wanted is None else wanted):
        return
    _runs.append(weakref.WeakMethod(end))
    current = signal.getsignal(signal.SIGTERM)
    if isinstance(current, _Handler):
        return
    if threading.current_thread() is not threading.main_thread() or current is None:
        if wanted:
            why = "the run was not started on the main thread" if current is not None else "other code handles it"
            logger.warning("ess_monitor: SIGTERM does not end the run as terminated: %s.", why)
    elif current != signal.SIG_IGN:  # a process that ignores the signal does not end by it
        _register_fork_hook()
        signal.signal(signal.SIGTERM, _Handler(current))


def forget(end: Callable[[], None]) -> None:
    """Undo `watch`. With the last run the handler from before comes back."""
    _runs[:] = [run for run in _runs if run() not in (None, end)]
    if not _runs and os.name == "posix":
        _restore()


class _Handler:
    """Handles SIGTERM: ends the runs, then leaves the signal to the handler from before."""

    def __init__(self, previous: _Previous) -> None:
        self.previous = previous
        self.calls = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        global _is_ending
        self.calls += 1
        is_first = signal.getsignal(number) is self
        ending = [run for run in (reference() for reference in _runs) if run is not None]
        _runs.clear()
        if ending:
            _is_ending = True
            arguments = (ending, self if is_first else None)
            thread = threading.Thread(target=_end, args=arguments, name=_NAME, daemon=True)
            try:
                thread.start()
            except BaseException as error:
                _is_ending = False
                if not isinstance(error, RuntimeError):  # the process cannot start another thread
                    raise
            if not is_first:
                thread.join(_CHAINED_SECONDS)
        if is_first and _is_ending:
            return
        if callable(self.previous):
            self.previous(number, frame)
        elif is_first:  # or the handler that was installed later, and has called this one, decides what happens
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _end(runs: list[Callable[[], None]], first: _Handler | None) -> None:
    """End the runs, then send the signal again to the handler that was called first, if it is one of ours."""
    global _is_ending
    try:
        deadline = time.monotonic() + _END_SECONDS
        threads = [threading.Thread(target=_end_one, args=(run,), name=_NAME, daemon=True) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            logger.warning("ess_monitor: a sink was not closed within %g s of SIGTERM and is left.", _END_SECONDS)
    finally:
        _is_ending = False
        if first is not None:
            _send_again(first)


def _end_one(end: Callable[[], None]) -> None:
    try:
        end()
    except Exception as error:
        logger.warning("ess_monitor: the run could not be ended at SIGTERM: %s", format_error(error))
    else:
        logger.warning("ess_monitor: SIGTERM was received; the run is recorded as terminated.")


def _send_again(handler: _Handler) -> None:
    """Send the signal until it is handled: one that comes just before a system call is noticed only after the call."""
    calls, pause = handler.calls, _FIRST_PAUSE_SECONDS
    while True:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        time.sleep(pause)
        if handler.calls > calls or signal.getsignal(signal.SIGTERM) is not handler:
            return
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _restore() -> None:
    """Put the handler from before in the place of ours, unless another one has been installed since."""
    current = signal.getsignal(signal.SIGTERM)
    if isinstance(current, _Handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, current.previous)


@cache
def _register_fork_hook() -> None:
    os.register_at_fork(after_in_child=_leave_to_parent)


def _leave_to_parent() -> None:
    """Watch nothing in a forked child: a data loader's worker is ended by SIGTERM too."""
    global _is_ending
    _runs.clear()
    _is_ending = False
    _restore()
