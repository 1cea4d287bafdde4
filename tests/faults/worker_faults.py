"""Faults of the worker: it cannot compute, has no memory, exits, hangs or is slow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

import ess_monitor.pipeline.queue as measuring
from ess_monitor import Monitor, MonitorConfig, PartError
from tests.faults.harness import (
    SETTINGS,
    Injection,
    Outcome,
    backbone,
    batches,
    case,
    hooks_of,
    loss_of,
    state_bytes,
    train,
    watch,
)


@case("torch.linalg.svdvals raises LinAlgError at every sample, and so does its fallback, eigvalsh")
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
    run = watch(meanwhile=lambda step, monitor: _wait(monitor), steps=32)
    counts, health = run.snapshot.measurements_total, run.snapshot.health
    return Outcome(
        run.unchanged,
        {
            "status failed, why": set(run.statuses) == {"failed"}
            and all(str(error) in r.message for m in run.sink.measurements for r in m.readings),
            "three failed, ten skipped, tried again": counts == {"ok": 0, "skipped": 12, "failed": 4},
            "part_failures_total": health.part_failures_total["measurement"] == 8,
            "log, each step once": injection.said("no memory to measure a sample") == 3,
            "nothing is turned off": health.layers_off == health.parts_off == (),
        },
    )


@case("the worker has no memory for more than two samples of a batch")
def worker_short_of_memory(injection: Injection) -> Outcome:
    original = measuring.compute

    def compute(captured: Any, *args: Any) -> Any:
        if captured.operator.batch > 2:
            raise torch.OutOfMemoryError("out of memory")
        return original(captured, *args)

    injection.patch.setattr(measuring, "compute", compute)
    run = watch(meanwhile=lambda step, monitor: _wait(monitor))
    operators = [r.operators for m in run.sink.measurements for r in m.readings if r.status == "ok"]
    return Outcome(
        run.unchanged,
        {
            "one failed, then a smaller slice": run.statuses == ["failed"] * 2 + ["ok"] * 10 and set(operators) == {2},
            "log": injection.said("the next samples take half of the samples and heads") == 1,
        },
    )


@case("every computation of the worker raises, and strict=True")
def strict_raises(injection: Injection) -> Outcome:
    injection.patch.setattr(measuring, "compute", _raising(ValueError("injected")))
    raised: list[PartError] = []
    data, expected = batches(), train(backbone())
    model, losses = backbone(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = Monitor(model, MonitorConfig.load(environment=False, **SETTINGS, strict=True))
    monitor.start()
    for tokens in data:
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        try:
            monitor.step({"loss": loss})
            monitor.flush(30.0)
        except PartError as error:  # a loop that does not catch it ends here
            raised.append(error)
    monitor.close("failed")
    return Outcome(
        expected.endswith(state_bytes(model)) and not hooks_of(model),
        {
            "PartError at a step": bool(raised) and raised[0].part == "measurement",
            "from its cause": isinstance(raised[0].__cause__, ValueError),
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
        {
            "status timed_out, why": bool(messages) and all("runtime.timeout_seconds" in m for m in messages),
            "part_failures_total": run.snapshot.health.part_failures_total["worker"] >= 1,
            "log, once": injection.said("worker failed (a sample was given up: not measured within") == 1,
        },
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
    """Wait for the worker, so that a case does not depend on its speed."""
    monitor.flush(30.0)
