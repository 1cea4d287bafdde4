"""Shared code of the two examples for several ranks: options, fingerprints of the model, the summary."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ess_monitor import Monitor

BATCH = 32
"""Samples of a batch over all ranks, so that the amount of data does not depend on their number."""

SETTINGS: dict[str, Any] = {
    "every_n_steps": 50,
    "overhead_budget_ratio": 0.05,
    "diagnosis": {"metric": "accuracy", "metric_solved": 0.9, "warmup_steps": 300},
    "autopilot": "auto",
}
"""Settings of the monitor, as in `make demo`."""


def options(description: str | None, out: str, strategies: tuple[str, ...] = ()) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps")
    parser.add_argument(
        "--settings", type=json.loads, default={}, metavar="JSON", help="settings of the monitor, which override ours"
    )
    if strategies:
        parser.add_argument("--strategy", choices=strategies, default=strategies[0])
    parser.add_argument("--no-monitor", action="store_true", help="train without a monitor")
    parser.add_argument("--die", metavar="RANK:STEP", default="", help="kill that rank at that step")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of the event log")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the summary to FILE")
    arguments = parser.parse_args()
    arguments.settings = {**SETTINGS, **arguments.settings}
    return arguments


class Steps:
    """Times the steps, and kills this process at the step of `--die`."""

    def __init__(self, die: str, rank: int) -> None:
        doomed, _, at = die.partition(":")
        self._last_step = int(at) if die and int(doomed) == rank else None
        self._before: float | None = None
        self.seconds: list[float] = []

    def ended(self, step: int) -> None:
        """Record the end of an optimizer step."""
        now = time.perf_counter()
        if self._before is not None:
            self.seconds.append(now - self._before)
        self._before = now
        if step == self._last_step:
            os.kill(os.getpid(), signal.SIGKILL)


def fingerprint(model: nn.Module) -> str:
    """Return a hash of all parameters and buffers. Ranks with equal hashes hold the same model."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        digest.update(name.encode() + whole.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def summarize(
    arguments: argparse.Namespace, model: nn.Module, steps: Steps, accuracy: float, monitor: Monitor | None
) -> int:
    """Compare the ranks and print on rank 0; return 1 if models or actions differ. Every rank must call it."""
    actions = []
    if monitor is not None:
        actions = [f"{a.step} {a.layer} {a.action} {a.strength or ''} {a.outcome}" for a in monitor.actions]
    mine = {
        "fingerprint": fingerprint(model),
        "actions": actions,
        "step_seconds": statistics.median(steps.seconds),
        "overhead_ratio": None if monitor is None else monitor.overhead_ratio,
        "measurements": {} if monitor is None else dict(monitor.snapshot().measurements_total),
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    equal = len({one["fingerprint"] for one in everyone}) == 1
    alike = all(one["actions"] == actions for one in everyone)
    if dist.get_rank() == 0:
        for rank, one in enumerate(everyone):
            share = "no monitor" if monitor is None else f"monitor {one['overhead_ratio']:.2%} of the time"
            print(f"rank {rank}: model {one['fingerprint']}, median step {1e3 * one['step_seconds']:.1f} ms, {share}")
        print("\n".join(["actions:", *(f"  step {action}" for action in actions or ["none"])]))
        print(f"accuracy {accuracy:.3f}; models {'equal' if equal else 'DIFFER'}", end="")
        print(f", actions {'alike' if alike else 'DIFFER'} on {len(everyone)} ranks", flush=True)
        if arguments.json is not None:
            summary = {"ranks": everyone, "accuracy": accuracy, "equal": equal, "alike": alike}
            arguments.json.write_text(json.dumps(summary, indent=2) + "\n")
    return int(not (equal and alike))
