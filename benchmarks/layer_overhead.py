"""What the monitor costs a step of a 24-layer model of transformers: while it stands by, and when it takes a sample.

    python -m benchmarks.layer_overhead [--json FILE]

Whole runs one after the other differ by several percent for reasons of the machine alone. So the monitor comes and goes
within one run: blocks of a few steps without any monitor take turns with blocks at whose beginning one is built and
started. The first step of each block is the sampled one, or a bare one of no account; then the sample is waited for,
and the steps that follow are not sampled. They are compared with those of the bare blocks on either side.

Blocks on a machine that others use differ by more than what is looked for. Therefore two clocks, that of the wall and
that of the training thread's own processor time, which does not count while others run; the median over many blocks
with its 95 % interval by order statistics (sign test); and the time inside `monitor.step` itself. Between two samples
that is all there is to the monitor: it has no hook in the model, which is checked.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report import Result, main
from ess_monitor import Monitor, MonitorConfig
from ess_monitor.records import PHASES

LAYERS, LENGTH, STEPS, PAIRS = 24, 128, 6, 24
MAX_OVERHEAD = 0.002
_METHOD = f"{LAYERS} layers, {LENGTH} tokens, one thread, {PAIRS} blocks of {STEPS} steps between bare ones"
_COMMON = {"vocab_size": 256, "num_hidden_layers": LAYERS, "use_cache": False, "pad_token_id": 0, "eos_token_id": 0}

Timing = tuple[float, float]
"""Seconds of the wall clock, and of processor time of the training thread."""


@dataclass
class Timings:
    """What one model's run gives: blocks of steps in turn, the first and the last without a monitor."""

    blocks: list[list[Timing]] = field(default_factory=list)
    armed: list[Timing] = field(default_factory=list)
    """The sampled step of every watched block."""
    accounts: list[dict[str, float]] = field(default_factory=list)
    """Of every watched block the monitor's own account, in seconds by phase."""
    calls: list[float] = field(default_factory=list)
    """Seconds inside `monitor.step`, where nothing was sampled."""
    unarmed_hooks: int = 0


def mamba2() -> nn.Module:
    """Mamba-2: 24 layers of 8 heads of 16, state 16."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"hidden_size": 64, "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 32}
    return Mamba2ForCausalLM(Mamba2Config(**_COMMON, **sizes, bos_token_id=0))


def llama() -> nn.Module:
    """Llama: 24 layers of 4 heads of 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**_COMMON, **sizes, bos_token_id=0))


def hooks_of(model: nn.Module) -> int:
    """Forward hooks in the model, of anybody."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def timings(build: Callable[[], nn.Module], batch: int, pairs: int = PAIRS, steps: int = STEPS) -> Timings:
    """Train on random tokens, with a monitor in every second block."""
    torch.manual_seed(0)
    model = build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = Timings()

    def train(monitor: Monitor | None, tokens: Tensor) -> tuple[Timing, float]:
        """One step; its time, and the part of it inside `monitor.step`."""
        wall, cpu = time.perf_counter(), time.thread_time()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        called = time.perf_counter()
        if monitor is not None:
            monitor.step({"loss": loss}, optimizer=optimizer)
        end = time.perf_counter()
        return (end - wall, time.thread_time() - cpu), end - called

    data = (torch.randint(1, 256, (batch, LENGTH)) for _ in itertools.count())
    train(None, next(data))  # allocations and caches
    for number in range(2 * pairs + 1):
        # An interval beyond the block: one sample at its beginning, and none after.
        monitor = Monitor(model, MonitorConfig(every_n_steps=10**6)) if number % 2 else None
        if monitor is not None:
            monitor.start()
        first, _ = train(monitor, next(data))
        if monitor is not None:
            monitor.flush()
            found.armed.append(first)
            found.unarmed_hooks = max(found.unarmed_hooks, hooks_of(model))
            account = monitor.snapshot().overhead_seconds
            found.accounts.append({phase: histogram.total_seconds for phase, histogram in account.items()})
        block = [train(monitor, next(data)) for _ in range(steps)]
        found.blocks.append([timing for timing, _ in block])
        if monitor is not None:
            found.calls += [call for _, call in block]
            wrong = [reading for reading in monitor.readings if reading.status != "ok"]
            if wrong or len(monitor.readings) != LAYERS:
                raise RuntimeError(f"{len(monitor.readings)} of {LAYERS} layers were measured; {wrong[:1]}")
            monitor.close()
    return found


def median_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the order statistics between which that of the population lies with at least 95 %.

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


def unarmed_overheads(blocks: Sequence[Sequence[Timing]], clock: int) -> list[float]:
    """Each watched block's median step over those of its neighbours, minus 1."""
    medians = [statistics.median(timing[clock] for timing in block) for block in blocks]
    return [2 * medians[k] / (medians[k - 1] + medians[k + 1]) - 1 for k in range(1, len(medians) - 1, 2)]


def bare_seconds(found: Timings) -> float:
    """The median step without a monitor."""
    return statistics.median(wall for block in found.blocks[::2] for wall, _ in block)


def unarmed_row(name: str, found: Timings) -> tuple[dict[str, Any], list[str]]:
    """What the monitor costs while nothing is sampled, and what is wrong with that."""
    step = bare_seconds(found)
    row: dict[str, Any] = {"model": name, "bare step, ms": 1e3 * step}
    failures = []
    for clock, label in enumerate(("wall", "processor")):
        median, low, high = median_and_interval(unarmed_overheads(found.blocks, clock))
        row[f"{label}, median"], row[f"{label}, 95 %"] = f"{median:+.2%}", f"{low:+.2%} to {high:+.2%}"
        if low > MAX_OVERHEAD:
            failures.append(f"{name}: an unsampled step costs {median:+.2%} ({label}), at least {low:+.2%}")
    share = statistics.median(found.calls) / step
    row |= {"monitor.step, us": 1e6 * share * step, "of a step": f"{share:.3%}", "hooks": found.unarmed_hooks}
    if share > MAX_OVERHEAD:
        failures.append(f"{name}: monitor.step takes {share:.2%} of a step, target at most {MAX_OVERHEAD:.1%}")
    if found.unarmed_hooks:
        failures.append(f"{name}: {found.unarmed_hooks} hooks are in the model although nothing is sampled")
    return row, failures


def armed_row(name: str, found: Timings) -> dict[str, Any]:
    """What a sample costs: the training thread's step, and the monitor's own account."""

    def account(*phases: str) -> float:
        return statistics.median(sum(one[phase] for phase in phases) for one in found.accounts)

    step, sampled = bare_seconds(found), statistics.median(wall for wall, _ in found.armed)
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


@functools.cache
def measured() -> dict[str, Timings]:
    """Both models' runs."""
    logging.disable(logging.WARNING)  # transformers says that there are no kernels for a CPU
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"Mamba-2": timings(mamba2, batch=2), "Llama": timings(llama, batch=8)}


def unarmed() -> Result:
    """Steps that are not sampled."""
    found = [unarmed_row(name, timings) for name, timings in measured().items()]
    return Result(
        f"A step that is not sampled, with a monitor and without; {_METHOD}",
        [row for row, _ in found],
        ["wall, processor: paired differences; monitor.step is all of the monitor that runs in such a step"],
        [failure for _, failures in found for failure in failures],
    )


def armed() -> Result:
    """Steps that are."""
    return Result(
        f"A sampled step at the defaults (4 sequences, 4 heads, 3 positions of every layer); {_METHOD}",
        [armed_row(name, timings) for name, timings in measured().items()],
        ["account: what the monitor itself says it took; the worker computes beside the training"],
    )


if __name__ == "__main__":
    sys.exit(main([unarmed, armed], __doc__))
