"""Faults in the worker: it cannot compute, has no memory, dies, hangs or is slow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

import ess_monitor.measuring as measuring
from tests.faults.harness import Injection, Outcome, case, watch


@case("torch.linalg.svdvals raises LinAlgError at every sample, and so does its stand-in, eigvalsh")
def SVD_does_not_converge(injection: Injection) -> Outcome:
    error = torch.linalg.LinAlgError("the algorithm failed to converge")
    for driver in ("svdvals", "eigvalsh"):
        injection.patch.setattr(torch.linalg, driver, _raising(error))
    run = watch()
    return Outcome(
        run.unchanged,
        {
            "status nonfinite, why": set(run.statuses) == {"nonfinite"}
            and all("did not converge" in r.message for m in run.sink.measurements for r in m.readings),
            "nonfinite_total": set(run.snapshot.nonfinite_total.values()) == {6},
        },
    )


@case("torch.linalg.svdvals raises OutOfMemoryError at every sample")
def worker_out_of_memory(injection: Injection) -> Outcome:
    error = torch.OutOfMemoryError("out of memory, tried to allocate 2.00 GiB")
    injection.patch.setattr(torch.linalg, "svdvals", _raising(error))
    run = watch(meanwhile=lambda step, monitor: _wait(monitor))
    counts = run.snapshot.measurements_total
    return Outcome(
        run.unchanged,
        {
            "status failed, why": set(run.statuses) == {"failed"}
            and all(str(error) in r.message for m in run.sink.measurements for r in m.readings),
            "failed, then skipped": counts["failed"] == 3 and counts["skipped"] == 3,
            "log": injection.said("measurement failed (layer blocks.0.mixer: OutOfMemoryError: out of memory") == 1,
            "turned off, once": injection.said("measurement failed 5 times in a row and is off") == 1,
        },
    )


def _raising(error: Exception) -> Callable[..., Any]:
    def explode(*args: Any, **kwargs: Any) -> Any:
        raise error

    return explode


@case("code in the worker calls sys.exit() while it computes the second sample")
def worker_dies(injection: Injection) -> Outcome:
    samples = []
    original = measuring.compute

    def compute(*args: Any) -> Any:
        samples.append(args)
        if len(samples) == 3:  # two layers a sample
            raise SystemExit("injected")
        return original(*args)

    injection.patch.setattr(measuring, "compute", compute)
    run = watch(meanwhile=lambda step, monitor: _wait(monitor))
    return Outcome(
        run.unchanged,
        {
            "status failed, then ok": run.statuses == ["ok", "ok", "failed", "ok", *["ok"] * 8],
            "log": injection.said("SystemExit: injected") == 1,
        },
    )


@case("the computation of every sample hangs")
def worker_hangs(injection: Injection) -> Outcome:
    gate = threading.Event()
    injection.patch.setattr(measuring, "compute", lambda *args: gate.wait(60) and {})

    def meanwhile(step: int, monitor: Any) -> None:
        if step == 10:
            time.sleep(0.05)  # until the first samples are late
        if step == 11:
            gate.set()

    run = watch(settings={"runtime": {"queue_length": 2, "timeout_seconds": 0.01}}, meanwhile=meanwhile)
    messages = [r.message for m in run.sink.measurements for r in m.readings if r.status == "timed_out"]
    return Outcome(
        run.unchanged,
        {"status timed_out, why": bool(messages) and all("runtime.timeout_seconds" in m for m in messages)},
    )


@case("the worker has not finished the first sample when the next ones are taken")
def worker_slow(injection: Injection) -> Outcome:
    gate = threading.Event()
    original = measuring.compute
    injection.patch.setattr(measuring, "compute", lambda *args: (gate.wait(60), original(*args))[1])
    run = watch(
        settings={"runtime": {"queue_length": 1}},
        meanwhile=lambda step, monitor: gate.set() if step == 8 else None,
    )
    counts = run.snapshot.measurements_total
    return Outcome(
        run.unchanged,
        {
            "first sample ok": run.sink.steps[0] == 0 and set(run.statuses) == {"ok"},
            "skipped measurements": counts["skipped"] >= 4 and counts["ok"] + counts["skipped"] == 6,
        },
    )


def _wait(monitor: Any) -> None:
    """For the worker, so that a case does not depend on how fast it is."""
    monitor.flush(30.0)
