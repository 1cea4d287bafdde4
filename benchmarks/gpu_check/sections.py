"""The sections of the check. Each yields rows; `ok` is False in a row whose promise is not kept."""

from __future__ import annotations

import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.gpu_check.training import DEVICE, HAS_CUDA, Row, Training, statuses, synchronize, waits_of_threads
from ess_monitor import Monitor, capture_operators
from ess_monitor.capture.sampler import Sampler
from ess_monitor.ess import measure, operator_positions, tolerance_ess

MAX_OVERHEAD = 0.005
"""Share of the time of a run at defaults."""
_NEEDS_CUDA: Row = {"skipped": "needs CUDA"}


def environment(dry: bool) -> Iterator[Row]:
    """Versions and devices, and whether the callback of Lightning can be imported."""
    packages = [name for name in ("pytorch_lightning", "transformers", "triton") if importlib.util.find_spec(name)]
    yield {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name.replace("_", "-")) for name in packages},
        "device": torch.cuda.get_device_name() if HAS_CUDA else "cpu",
        "devices": torch.cuda.device_count(),
        "processors": os.cpu_count(),
        "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "not set"),
    }
    if "pytorch_lightning" in packages:
        from ess_monitor.integrations.lightning import ESSMonitorCallback

        yield {"Lightning's callback": ESSMonitorCallback.__name__, "ok": True}


def tests(dry: bool) -> Iterator[Row]:
    """The tests that need a device, which are skipped elsewhere."""
    if importlib.util.find_spec("pytest") is None:
        yield {"skipped": "needs pytest"}
        return
    places = ["tests/runtime/test_accelerator.py"] if dry else ["tests/ess", "tests/runtime"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *places]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
    yield {"end status": done.returncode, "tests": "".join(last), "ok": done.returncode == 0}


def numbers(dry: bool) -> Iterator[Row]:
    """T and ESS of the same net and batch on the device and on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for featurizer in ("gla", "s6", "sa"):
        model = Training(dry, featurizer=featurizer, depth=2).model.eval()
        tokens = torch.randint(0, 64, (2, 16 if dry else 256))
        there = capture_operators(model, tokens.to(DEVICE))
        here = capture_operators(deepcopy(model).cpu(), tokens)
        for name, operator in here.items():
            T, T_there = operator.materialize(), there[name].materialize().cpu()
            positions = operator_positions(operator.length, 3)
            sizes = [tolerance_ess(each.singular_values(positions).cpu()) for each in (operator, there[name])]
            error = float((T - T_there).abs().max() / T.abs().max())
            differ = int((sizes[0] != sizes[1]).sum())
            # A singular value at the tolerance itself may fall on either side of it.
            ok = error < 1e-4 and differ <= 0.01 * sizes[0].numel()
            yield {"layer": f"{featurizer} {name}", "max|dT|/max|T|": error, "ESS that differ": differ, "ok": ok}


def waits(dry: bool) -> Iterator[Row]:
    """No call of the training thread waits for the device, and the worker makes none."""
    training = Training(dry)
    training.step()
    with training.monitor(3) as monitor:
        with waits_of_threads() as found:
            for _ in range(6 if dry else 40):
                training.step(monitor)
        monitor.flush(100)
        yield {"waits by thread": found, "measured": statuses(monitor), "ok": not found and "ok" in statuses(monitor)}


def losses(dry: bool) -> Iterator[Row]:
    """The losses with the monitor are those without it, bit by bit."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for name in ("plain", "deterministic", "autocast", "compiled"):
        torch.use_deterministic_algorithms(name == "deterministic")
        found, measured = [], {}
        for watched in (False, True, False):
            training = Training(dry, autocast=name == "autocast", compiled=name == "compiled")
            with training.monitor(3) as monitor:
                for _ in range(6 if dry else 30):
                    training.step(monitor if watched else None)
                monitor.flush(100)
                measured = statuses(monitor) if watched else measured
            found.append(torch.stack(training.losses).cpu())
        torch.use_deterministic_algorithms(False)
        repeats, same = torch.equal(found[0], found[2]), torch.equal(found[0], found[1])
        row = {"training": name, "bare runs equal": repeats, "watched equal": same, "measured": measured}
        yield {**row, "ok": (same or not repeats) and set(measured) == {"ok"}}


def graphs(dry: bool) -> Iterator[Row]:
    """Graphs that are recorded while samples are under way come through; a recorded forward pass is not read."""
    if not HAS_CUDA:
        yield _NEEDS_CUDA
        return
    for mode in ("global", "thread_local"):
        training, failed, first = Training(dry), 0, ""
        x = torch.randn(64, 64, device=DEVICE)
        training.step()
        with training.monitor(1) as monitor:
            for _ in range(20):
                training.step(monitor)  # a sample is under way
                graph = torch.cuda.CUDAGraph()
                try:
                    with torch.cuda.graph(graph, capture_error_mode=mode):
                        y = x
                        for _ in range(300):
                            y = y @ x * 0.1
                    graph.replay()
                except RuntimeError as error:
                    failed, first = failed + 1, first or str(error)[:120]
            monitor.flush(100)
            row = {"mode": mode, "graphs lost": f"{failed} of 20", "first": first, "measured": statuses(monitor)}
            yield {**row, "ok": failed == 0 and "ok" in statuses(monitor)}


def overlap(dry: bool) -> Iterator[Row]:
    """A step bare, with a monitor that stands by, and while samples are under way all the time, in turn in one run."""
    for name, sizes in (("many small layers", {}), ("large products", {"width": 1024, "depth": 6, "length": 1024})):
        training, times = Training(dry, **sizes), {"bare": [], "standing by": [], "under way": []}
        steps, rounds = (2, 2) if dry else (12, 10)
        for _ in range(3):
            training.step()
        with training.monitor(10**6) as monitor:
            training.step(monitor)
            monitor.flush(100)
            for round_ in range(rounds):
                order = list(times)[round_ % 3 :] + list(times)[: round_ % 3]
                for state in order:
                    synchronize()
                    begin = time.perf_counter()
                    for step in range(steps):
                        if state == "under way" and step % 2 == 0:
                            monitor.arm()
                        training.step(None if state == "bare" else monitor)
                    synchronize()
                    times[state].append((time.perf_counter() - begin) / steps)
                    monitor.flush(100)
            overhead = monitor.snapshot().overhead_seconds
        bare = statistics.median(times["bare"])
        extra = {state: statistics.median(map(float.__truediv__, times[state], times["bare"])) - 1 for state in times}
        # A sample's share at defaults: every 50 steps at least, and stretched so that its own account keeps to 1 %.
        samples = max(1, overhead["capture"].count)
        account = sum(part.total_seconds for part in overhead.values()) / samples
        interval = max(50.0, account / (0.01 * bare))
        at_defaults = max(0.0, extra["standing by"]) + 2 * max(0.0, extra["under way"]) / interval
        del extra["bare"]
        row = {"training": name, "bare, ms": 1e3 * bare, **extra, "a run at defaults": at_defaults}
        yield {**row, "ok": None if dry else at_defaults <= MAX_OVERHEAD}


def memory(dry: bool) -> Iterator[Row]:
    """What is held on the device beside the training, at most and after the samples; and that its loss ends nothing."""
    if HAS_CUDA:
        training = Training(dry, width=512, depth=8, length=512)
        for _ in range(3):
            training.step()
        peaks = []
        with training.monitor(2) as monitor:
            held = torch.cuda.memory_allocated()
            for watched in (None, monitor):
                torch.cuda.reset_peak_memory_stats()
                for _ in range(10):
                    training.step(watched)
                peaks.append(torch.cuda.max_memory_allocated() / 2**20)
                monitor.flush(100)
                synchronize()
            left = (torch.cuda.memory_allocated() - held) / 2**20
            yield {"peak bare, MiB": peaks[0], "watched, MiB": peaks[1], "left, MiB": left, "ok": left < 16}
            yield _at_a_limit(training, monitor)
    found, lost = [], {}
    for watched in (False, True):
        training = Training(dry)
        with training.monitor(2) as monitor, _no_memory_for_copies(2):
            for _ in range(10):
                training.step(monitor if watched else None)
                monitor.flush(100)
            lost = statuses(monitor)
        found.append(torch.stack(training.losses).cpu())
    same = torch.equal(*found)
    yield {"out of memory in two samples": lost, "losses equal": same, "ok": same and {"ok", "failed"} <= set(lost)}


def _at_a_limit(training: Training, monitor: Monitor) -> Row:
    """Give the process no more memory than the training needs: the samples may find none, the training must."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        training.step()
    needed, lost = torch.cuda.max_memory_reserved(), ""
    torch.cuda.set_per_process_memory_fraction(min(1.0, needed / torch.cuda.get_device_properties(DEVICE).total_memory))
    try:
        for watched in (None, monitor):
            for _ in range(6):
                training.step(watched)
        monitor.flush(100)
    except torch.OutOfMemoryError as error:
        lost = "bare" if watched is None else f"watched: {str(error)[:100]}"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    row: Row = {"limit, MiB": needed / 2**20, "training lost": lost or "no", "measured": statuses(monitor)}
    return {**row, "ok": not lost.startswith("watched")}


class _no_memory_for_copies:
    """Let the copies of the first samples fail as where the device has no memory left."""

    def __init__(self, samples: int) -> None:
        self._last, self._take = samples, Sampler._take

    def __enter__(self) -> None:
        last, take = self._last, self._take

        def none_left(sampler: Sampler, *call: object) -> object:
            if sampler.turn < last:
                raise torch.OutOfMemoryError("out of memory, on purpose")
            return take(sampler, *call)  # type: ignore[arg-type]

        Sampler._take = none_left  # type: ignore[method-assign,assignment]

    def __exit__(self, *error: object) -> None:
        Sampler._take = self._take  # type: ignore[method-assign]


def sample(dry: bool) -> Iterator[Row]:
    """What one sample costs: bytes and milliseconds of the way to the host, and the computation there."""
    for featurizer in ("gla", "s6", "sa"):
        training = Training(dry, featurizer=featurizer, length=1024)
        training.step()
        with training.monitor(10**6) as monitor:
            training.step(monitor)
            monitor.flush(100)
            account = {phase: part.total_seconds for phase, part in monitor.snapshot().overhead_seconds.items()}
        operators = capture_operators(training.model, torch.randint(0, 64, (2, 16 if dry else 1024), device=DEVICE))
        first = next(iter(operators.values()))
        size = sum(tensor.nbytes for operator in operators.values() for tensor in operator.tensors)
        host = first.map(lambda tensor: tensor.cpu())
        seconds = []
        for operator in (first, host):
            begin = time.perf_counter()
            measure(operator, operator_positions(operator.length, 3))
            synchronize()
            seconds.append(time.perf_counter() - begin)
        row: Row = {"layers": featurizer, "MiB": size / 2**20, "capture, ms": 1e3 * account["capture"]}
        there, here = (1e3 * each for each in seconds)
        yield {**row, "worker, ms": 1e3 * account["measure"], "one layer there, ms": there, "here, ms": here}


SECTIONS: dict[str, tuple[Callable[[bool], Iterator[Row]], float]] = {
    "environment": (environment, 30),
    "tests": (tests, 60),
    "numbers": (numbers, 50),
    "waits": (waits, 40),
    "losses": (losses, 80),
    "graphs": (graphs, 40),
    "overlap": (overlap, 90),
    "memory": (memory, 50),
    "sample": (sample, 40),
}
"""Name -> section, and its limit in seconds; 480 together."""
