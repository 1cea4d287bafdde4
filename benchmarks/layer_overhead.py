"""Measures the monitor's cost per step of a 24-layer model of transformers, with and without a sample.

    python -m benchmarks.layer_overhead [--json FILE]

Whole runs, and even blocks of a few steps, differ by several percent because of the machine. The cost to be measured is
about a thousandth. Therefore single steps alternate in the order a b b a, which favors neither: a step that ends with
`monitor.step`, as in a monitored training, and a step that does not. The monitor has taken its first sample before and
takes none in between. The benchmark checks that the monitor has no hook in the model, no patch in a library and no
effect on the compiler, so that the call is its whole cost. Each monitored step is compared with the neighboring step on
two clocks: wall time, and the processor time of the training thread, which excludes other threads. The table has the
median over many pairs, its 95 % interval by order statistics (sign test), which assumes no shape of the noise, and the
time inside `monitor.step`. The effect of a call at the end of a step on the caches of the next step is equal in both
kinds of step, and so is not measured here.

Hundreds of such pairs resolve about 0.5 %. A second set of pairs therefore enlarges the cost, and includes the effect
on the caches: a monitored step calls `monitor.step` once after each of the 24 layers, and 1/24 of the difference is the
cost of one call. About a millisecond of the model's work lies between two calls, so a call finds its own code and data
in the caches more often than at the end of a step, and is shorter. Both are timed directly. The upper bound in the
table is the upper end of the interval plus the extra time of a call at the end.

In a second run a sample is taken every few steps, and the sampled step is compared with the others.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.report import Result, main
from ess_monitor import Monitor, MonitorConfig
from ess_monitor.capture.hooks.compiler import _HOLDERS
from ess_monitor.capture.hooks.function_patch import _PATCHES
from ess_monitor.records import PHASES

LAYERS, LENGTH = 24, 64
PAIRS = 600
"""Pairs of a monitored and a bare step, in each set."""
SAMPLES, STEPS = 24, 6
"""Samples, and unsampled steps after each of them."""
MAX_OVERHEAD = 0.002
_METHOD = f"{LAYERS} layers, {LENGTH} tokens, one thread"
_COMMON = {"vocab_size": 256, "num_hidden_layers": LAYERS, "use_cache": False, "pad_token_id": 0, "eos_token_id": 0}

Timing = tuple[float, float]
"""Seconds of the wall clock, and of processor time of the training thread."""


@dataclass
class StandingBy:
    """Timings of alternating steps with and without the monitor's call."""

    watched: list[Timing] = field(default_factory=list)
    bare: list[Timing] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    """Seconds inside one `monitor.step`."""
    hooks: int = 0
    """Forward hooks in the model between two samples."""

    def differences(self, clock: int) -> list[float]:
        """Return the added time of the calls in one step for each pair, in seconds of that clock."""
        return [a[clock] - b[clock] for a, b in zip(self.watched, self.bare, strict=True)]


@dataclass
class SampledRun:
    """Timings of a run in which a sample is taken every few steps."""

    bare: list[float] = field(default_factory=list)
    """Seconds of each unsampled step."""
    armed: list[float] = field(default_factory=list)
    """Seconds of each sampled step."""
    accounts: list[dict[str, float]] = field(default_factory=list)
    """The monitor's own account of each sample, in seconds by phase."""


def mamba2() -> nn.Module:
    """Build a Mamba-2 with 24 layers of 8 heads of 16, state 16."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"hidden_size": 64, "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 32}
    return Mamba2ForCausalLM(Mamba2Config(**_COMMON, **sizes, bos_token_id=0))


def llama() -> nn.Module:
    """Build a Llama with 24 layers of 4 heads of 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**_COMMON, **sizes, bos_token_id=0))


def hooks_of(model: nn.Module) -> int:
    """Count all forward hooks in the model."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class Training:
    """Trains a model on random tokens, one step at a time."""

    def __init__(self, build: Callable[[], nn.Module], batch: int) -> None:
        torch.manual_seed(0)
        self.model = build().train()
        self._batch = batch
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self._at_the_end = True
        self._monitor: Monitor | None = None
        self._calls: list[float] = []
        self.step(None)  # warm up allocations and caches

    def call_behind_every_layer(self) -> None:
        """Call the monitor after every layer instead of at the end. Bare steps get the same hooks."""
        layers = next(m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)
        for layer in layers:
            layer.register_forward_hook(lambda *_: self._call({}))
        self._at_the_end = False

    def _call(self, metrics: dict[str, torch.Tensor]) -> None:
        called = time.perf_counter()
        if self._monitor is not None:
            self._monitor.step(metrics, optimizer=self._optimizer)
        self._calls.append(time.perf_counter() - called)

    def step(self, monitor: Monitor | None) -> tuple[Timing, float]:
        """Run one step; return its time and that of its calls."""
        self._monitor, self._calls = monitor, []
        tokens = torch.randint(1, 256, (self._batch, LENGTH))
        wall, cpu = time.perf_counter(), time.thread_time()
        loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._at_the_end:
            self._call({"loss": loss})
        return (time.perf_counter() - wall, time.thread_time() - cpu), sum(self._calls)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Disable garbage collection, and keep the training thread on one core."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    gc.collect()
    gc.disable()
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        gc.enable()
        if cores:
            os.sched_setaffinity(0, cores)


def measured_by(monitor: Monitor) -> None:
    """Wait for the current sample, and check that all layers were measured."""
    readings = monitor.flush()
    wrong = [reading for reading in readings if reading.status != "ok"]
    if wrong or len(readings) != LAYERS:
        raise RuntimeError(f"{len(readings)} of {LAYERS} layers were measured; {wrong[:1]}")


def standing_by(build: Callable[[], nn.Module], batch: int, *, calls: int = 1, pairs: int = PAIRS) -> StandingBy:
    """Time steps with and without a monitor that takes no sample, called once a step or once a layer."""
    training, found = Training(build, batch), StandingBy()
    with Monitor(training.model, MonitorConfig(every_n_steps=10**6)) as monitor:
        training.step(monitor)
        measured_by(monitor)
        if calls > 1:
            training.call_behind_every_layer()
        with undisturbed():
            for pair in range(pairs):
                for watched in (True, False) if pair % 2 else (False, True):
                    timing, call = training.step(monitor if watched else None)
                    (found.watched if watched else found.bare).append(timing)
                    if watched:
                        found.calls.append(call / calls)
                if pair % 50 == 49:
                    gc.collect()
        if len(monitor.findings) or monitor.armed:
            raise RuntimeError("the monitor took a sample while it was to stand by")
        if _PATCHES or _HOLDERS:
            raise RuntimeError("the monitor watches ops, or holds the compiler, while it was to stand by")
        found.hooks = hooks_of(training.model) - (0 if calls == 1 else LAYERS)
    return found


def sampling(build: Callable[[], nn.Module], batch: int, samples: int = SAMPLES, steps: int = STEPS) -> SampledRun:
    """Time sampled and unsampled steps. Wait for each sample, so that the worker is idle during the others."""
    training, found = Training(build, batch), SampledRun()
    for _ in range(samples):
        # The interval is longer than the block: one sample at its start, and none after.
        with Monitor(training.model, MonitorConfig(every_n_steps=10**6)) as monitor:
            found.armed.append(training.step(monitor)[0][0])
            measured_by(monitor)
            account = monitor.snapshot().overhead_seconds
            found.accounts.append({phase: histogram.total_seconds for phase, histogram in account.items()})
            found.bare += [training.step(monitor)[0][0] for _ in range(steps)]
    return found


def median_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, and the order statistics that enclose the population's with at least 95 %.

    >>> median_and_interval([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    (6, 2, 10)
    """
    ordered, n = sorted(values), len(values)
    below, rank = 0.0, 0
    while below + math.comb(n, rank) / 2**n <= 0.025:
        below += math.comb(n, rank) / 2**n
        rank += 1
    outer = max(rank - 1, 0)
    return statistics.median(ordered), ordered[outer], ordered[n - 1 - outer]


def unarmed_row(name: str, found: StandingBy, repeated: StandingBy) -> tuple[dict[str, Any], list[str]]:
    """Return the row of the unsampled steps, and the targets that they miss."""
    step = statistics.median(wall for wall, _ in found.bare)
    call, behind_a_layer = statistics.median(found.calls), statistics.median(repeated.calls)
    row: dict[str, Any] = {"model": name, "pairs": len(found.bare), "bare step, ms": 1e3 * step}
    failures = []
    for clock, label in enumerate(("wall", "processor")):
        for pairs, calls in ((found, 1), (repeated, LAYERS)):
            usual = statistics.median(timing[clock] for timing in pairs.bare)
            shares = [difference / calls / usual for difference in pairs.differences(clock)]
            median, low, high = median_and_interval(shares)
            row[f"{label}, by {calls}"] = f"{median:+.3%} ({low:+.3%} to {high:+.3%})"
            if low > MAX_OVERHEAD:
                failures.append(f"{name}: an unsampled step costs {median:+.2%} ({label}), at least {low:+.2%}")
        up_to = high + max(0.0, call - behind_a_layer) / step  # from the set with many calls, which has the resolution
        row[f"{label}, up to"] = f"{up_to:.3%}"
        if up_to > MAX_OVERHEAD:
            failures.append(f"{name}: an unsampled step costs up to {up_to:.2%} ({label}), not {MAX_OVERHEAD:.1%}")
    row |= {
        "call, us": 1e6 * call,
        "of a step": f"{call / step:.3%}",
        "behind a layer, us": 1e6 * behind_a_layer,
        "hooks": found.hooks + repeated.hooks,
    }
    if row["hooks"]:
        failures.append(f"{name}: {row['hooks']} hooks are in the model although nothing is sampled")
    return row, failures


def armed_row(name: str, found: SampledRun) -> dict[str, Any]:
    """Return the row of the sampled steps: their time, and the monitor's own account."""

    def account(*phases: str) -> float:
        return statistics.median(sum(one[phase] for phase in phases) for one in found.accounts)

    step, sampled = statistics.median(found.bare), statistics.median(found.armed)
    total = account(*PHASES)
    return {
        "model": name,
        "bare step, s": step,
        "sampled step, s": sampled,
        "ratio": sampled / step,
        "account: capture, s": account("capture"),
        "measure (worker), s": account("measure"),
        "rest, s": account("diagnose", "intervene", "export"),
        "in steps": total / step,
        "steps between samples at 1 %": math.ceil(total / step / 0.01),
    }


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {"Mamba-2": (mamba2, 1), "Llama": (llama, 4)}
"""Name -> function that builds the model, and batch size."""


@contextmanager
def quiet() -> Iterator[None]:
    """Use one thread, and silence warnings about missing kernels for the CPU."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def unarmed() -> Result:
    """Measure unsampled steps."""
    with quiet():
        found = [
            unarmed_row(name, standing_by(*model), standing_by(*model, calls=LAYERS)) for name, model in MODELS.items()
        ]
    return Result(
        f"A step that is not sampled, with a monitor and without; {_METHOD}",
        [row for row, _ in found],
        [
            "wall, processor: cost of one call, median of the paired differences and its 95 % interval, as a share "
            "of a bare step",
            f"by 1: one call per step; by {LAYERS}: one call after every layer, and 1/{LAYERS} of the difference",
            "call: monitor.step at the end of a step, timed directly; nothing else of the monitor runs in such a step",
        ],
        [failure for _, failures in found for failure in failures],
    )


def armed() -> Result:
    """Measure sampled steps."""
    with quiet():
        rows = [armed_row(name, sampling(*model)) for name, model in MODELS.items()]
    return Result(
        f"A sampled step at the defaults (4 sequences, 4 heads, 3 positions of every layer); {_METHOD}",
        rows,
        ["account: the time that the monitor itself reports; the worker computes in parallel with the training"],
    )


if __name__ == "__main__":
    sys.exit(main([unarmed, armed], __doc__))
