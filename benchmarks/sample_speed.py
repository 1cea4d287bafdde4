"""Compares what a sample costs with two revisions: the operators of a layer, measured as the monitor measures them.

    python -m benchmarks.sample_speed [--before REVISION] [--json FILE]

The layers are real ones at their initialization. One sample of a layer is 4 sequences of 1024 tokens and 4 heads, at
the monitor's defaults. This process captures the operators and saves their tensors. Then one process for each revision
loads them and measures each in turn, and the two alternate: the machine may do other work, so that only ratios of
processor time mean something. Where the memory of a process lies matters, too: there are several pairs of them.
`--before` is checked out into a folder of its own, which is removed at the end.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.report import Result, main

BEFORE = "a08c346~1"
"""The revision that the targets are relative to: the last one before any of the work on speed."""
LENGTH, SAMPLES, HEADS, PROCESSES, REPEATS = 1024, 4, 4, 3, 5
ROOT = Path(__file__).parents[1]

CHILD = """
import dataclasses, sys, time, torch
from types import SimpleNamespace
import ess_monitor.ess as ess
from ess_monitor.capture import Captured
from ess_monitor.pipeline.readings import compute, reading
torch.set_num_threads(1)
cases = {}
for name, (kind, fields) in torch.load(sys.argv[1]).items():
    operator = getattr(ess, kind)(**fields)
    layer = SimpleNamespace(name=name, module=None)
    cases[name] = Captured(layer, operator, heads=(), channels=operator.heads, length=operator.length)
print("ready", flush=True)
def timed(case):
    started = time.process_time()
    return compute(case, 3, 1e-3), time.process_time() - started
for name in map(str.strip, sys.stdin):
    results, seconds = timed(cases[name])
    found = reading(0, cases[name], 1e-3, results)
    numbers = found.effective_size, found.effective_size_at, found.entropy_size, found.retention_ratio
    known = hasattr(cases[name], "with_retention")
    without = timed(dataclasses.replace(cases[name], with_retention=False))[1] if known else None
    print(repr((seconds, *numbers, without)), flush=True)
"""


@dataclass(frozen=True)
class Case:
    """A layer, and by how much a sample of it should be faster than before."""

    name: str
    build: Callable[[], nn.Module]
    target: float


def gla() -> nn.Module:
    """Build a GLA of 4 heads of 64."""
    from ess_monitor.featurizers import Backbone, BackboneConfig

    config = BackboneConfig(vocab_size=256, width=256, depth=1, featurizer="gla", num_heads=4, state_size=64)
    return Backbone(config)


def mamba2() -> nn.Module:
    """Build a Mamba-2 of 8 heads of 64, state 128."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"hidden_size": 256, "state_size": 128, "num_heads": 8, "head_dim": 64, "n_groups": 1, "chunk_size": 128}
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=256, num_hidden_layers=1, use_cache=False, **sizes))


def delta() -> nn.Module:
    """Build a gated delta rule of 4 heads of 128, with decays like those of a trained layer."""
    import transformers

    from benchmarks.layers.delta import _slow_down, _without_kernels

    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 128}
    experts = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 2}
    config = transformers.Qwen3NextConfig(
        vocab_size=256, num_hidden_layers=1, layer_types=["linear_attention"], head_dim=64, linear_value_head_dim=64,
        num_experts_per_tok=1, use_cache=False, **sizes, **linear, **experts,
    )  # fmt: skip
    model: nn.Module = transformers.Qwen3NextForCausalLM(config)
    _slow_down(model)
    _without_kernels(model)
    return model


def attention() -> nn.Module:
    """Build a softmax attention of 4 heads of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=1, use_cache=False, **sizes))


CASES = (
    Case("GLA, n 64", gla, 1.8),
    Case("Mamba-2, n 128", mamba2, 1.6),
    Case("gated delta rule, n 128", delta, 1.8),
    Case("softmax attention", attention, 2.5),
)


def save_operators(path: Path) -> None:
    """Capture the operator of each layer, and save its class and its tensors."""
    from ess_monitor import capture_operators

    saved = {}
    for case in CASES:
        torch.manual_seed(0)
        with torch.no_grad():
            (operator,) = capture_operators(case.build(), torch.randint(0, 256, (SAMPLES, LENGTH))).values()
        few = operator.select(heads=range(HEADS))
        fields = {name: getattr(few, name) for name in few.__dataclass_fields__ if getattr(few, name) is not None}
        saved[case.name] = type(few).__name__, fields
    torch.save(saved, path)


class Revision:
    """A process that measures with the package of one folder."""

    def __init__(self, folder: Path, operators: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", CHILD, str(operators)]
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def measure(self, name: str) -> tuple[Any, ...]:
        """Return the seconds of processor time of one sample, its numbers, and the seconds without A := I if it can."""
        assert self._process.stdin is not None
        print(name, file=self._process.stdin, flush=True)
        numbers: tuple[Any, ...] = eval(self._read())  # of our own child
        return numbers

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of a revision ended with status {self._process.wait()}")
        return line

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(before: str) -> Result:
    """Time both revisions in turn, one sample each, and compare what they found."""
    with tempfile.TemporaryDirectory() as name:
        folder, operators = Path(name) / "before", Path(name) / "operators.pt"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(folder), before], check=True)
        try:
            save_operators(operators)
            rounds = [_measured([folder, ROOT], operators) for _ in range(PROCESSES)]
            rows = [_compared(case, [pair for each in rounds for pair in each[case.name]]) for case in CASES]
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(folder)], check=True)
    missed = [f"{row['layer']}: {row['times as fast']:.2f}, target {row['target']}" for row in rows]
    failures = [text for text, row in zip(missed, rows, strict=True) if row["times as fast"] < row["target"]]
    notes = [
        f"before: {before}; medians of {PROCESSES} x {REPEATS} samples that alternate, processor time on one thread"
    ]
    return Result(f"A sample of one layer: {SAMPLES} x {HEADS} operators of {LENGTH} tokens", rows, notes, failures)


def _measured(folders: list[Path], operators: Path) -> dict[str, list[list[tuple[Any, ...]]]]:
    """Return what a process of each revision found of every case, time after time."""
    sides = [Revision(folder, operators) for folder in folders]
    found = {c.name: [[side.measure(c.name) for side in sides] for _ in range(REPEATS + 1)][1:] for c in CASES}
    for side in sides:
        side.close()
    return found


def _compared(case: Case, found: list[list[tuple[Any, ...]]]) -> dict[str, Any]:
    ratios = [old[0] / new[0] for old, new in found]
    old, new = found[0]
    return {
        "layer": case.name,
        "before s": statistics.median(old[0] for old, _ in found),
        "after s": statistics.median(new[0] for _, new in found),
        "times as fast": statistics.median(ratios),
        "lowest": min(ratios),
        "target": case.target,
        "without A := I": statistics.median(new[5] / new[0] for _, new in found),
        "ESS before": old[1],
        "ESS after": new[1],
        "same at 5 tolerances": old[2] == new[2],
        "entropy differs by": abs(old[3] - new[3]) / old[3],
        "retention differs by": 0.0 if old[4] is None else abs(old[4] - new[4]),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--before", default=BEFORE)
    chosen, sys.argv[1:] = parser.parse_known_args()
    warnings.simplefilter("ignore")
    sys.exit(main([lambda: compare(chosen.before)], __doc__))
