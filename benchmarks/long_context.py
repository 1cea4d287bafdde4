"""Measures what a sample of a layer costs at 8,192, 131,072 and 1,048,576 tokens, and compares it with all of them.

The reference of a diagonal recurrence is H_i from the tokens themselves: all rows of both factors in float64, seen from
the position by sums of log decays, a QR decomposition of each as a whole, and an SVD. That of a delta rule is its
operator without a crop, that of attention an SVD of the rows of T.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize

from benchmarks.report import Result, main
from ess_monitor import CaptureConfig
from ess_monitor.capture import Captured, CaptureSpec, Sampler
from ess_monitor.capture.layers import Layer
from ess_monitor.capture.spec import LazyOperator
from ess_monitor.ess import DeltaRecurrence, DiagonalRecurrence, Operator, SoftmaxAttention
from ess_monitor.ess.operators.reduced import ReducedRecurrence
from ess_monitor.pipeline.readings import compute, reading, reduce_long

THOUSAND, MILLION = 2**10, 2**20
CASES = [
    *(("gated, diagonal", n, length) for n in (64, 128) for length in (8 * THOUSAND, 128 * THOUSAND, MILLION)),
    *(("delta rule", 64, length) for length in (8 * THOUSAND, 128 * THOUSAND)),
    *(("softmax attention", 64, length) for length in (8 * THOUSAND, 128 * THOUSAND)),
]
HELD_BYTES, SECONDS, PEAK_BYTES = 64 * 2**20, 3.0, 2 * 10**9
"""Targets for n = 64: bytes that are held, seconds of one core at 131,072 tokens, and the peak at a million."""


class Mixer(nn.Module):
    """Stands for a layer that has computed its tensors: the costs of its own forward pass are no concern here."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def tensors(n: int, length: int) -> list[Tensor]:
    """Return q, k and the gate, (samples, heads, length, n) in float32, of tokens that repeat; samples are alike."""
    generator = torch.Generator().manual_seed(0)
    operators = 4 if length <= 8 * THOUSAND else 1
    few, repeats = min(length, 2**16), (operators, 1, length // min(length, 2**16), 1)
    return [torch.randn((1, operators, few, n), generator=generator).repeat(*repeats) for _ in range(3)]


def operator_of(kind: str, given: Sequence[Tensor], samples: Any, heads: Any, length: int) -> Operator:
    """Return what an adapter would read of these tensors: k as it is, q scaled, and the log decay."""
    q, k, gate = (tensor[samples][:, heads, :length] for tensor in given)
    if kind == "softmax attention":
        return SoftmaxAttention(q, k)
    log_decay, q = logsigmoid(gate), q * q.shape[-1] ** -0.5
    if kind == "delta rule":
        keys = normalize(k, dim=-1)
        return DeltaRecurrence(log_decay[..., :1] / 16, torch.sigmoid(gate[..., 1]), keys, q)
    return DiagonalRecurrence(log_decay.div_(16), k, q)


def status(name: str) -> int:
    """Return a figure of this process in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def sampled(kind: str, given: Sequence[Tensor]) -> tuple[Captured, float]:
    """Return the layer's part of a sample, and the seconds of one core that its hook took."""
    samples, heads, length = given[0].shape[:3]

    def form(rows: slice, chosen: Sequence[int], tokens: int) -> Operator:
        return operator_of(kind, given, rows, list(chosen), tokens)

    spec = CaptureSpec("any", lambda call: LazyOperator(samples, heads, length, form))
    model = Mixer()
    sampler = Sampler(
        (Layer("mixer", model, spec),),
        CaptureConfig(source="validation"),
        clock=time.process_time,
        reduce=lambda operator: reduce_long(operator, 3),
    )
    sampler.turn = 1  # the first sample of attention is at the start
    sampler.arm()
    model(torch.zeros(1))
    (item,) = sampler.collect()
    assert isinstance(item, Captured), item
    return item, sampler.capture_seconds


def reference(kind: str, given: Sequence[Tensor], item: Captured, positions: Sequence[int], length: int) -> Tensor:
    """Return the singular values of H_i of the first sample and head that were taken, at the middle position."""
    whole = operator_of(kind, given, slice(1), [item.heads[0]], length)
    i = positions[len(positions) // 2]
    if isinstance(whole, SoftmaxAttention):
        q, k = whole.q[0, 0].double(), whole.k[0, 0].double()
        logits = q[i:] @ k.mT * q.shape[-1] ** -0.5
        future = torch.arange(length) > torch.arange(i, length)[:, None]
        rows = logits.masked_fill_(future, -torch.inf).softmax(-1)[:, :i]
        return torch.linalg.eigvalsh(rows @ rows.mT).clamp(min=0).sqrt().flip(0)
    if isinstance(whole, DeltaRecurrence):
        return whole.singular_values([i])[0, 0, 0].double()
    assert isinstance(whole, DiagonalRecurrence)
    log_decay = whole.log_decay[0, 0].double()
    factors = []
    for rows, decays in ((whole.c[0, 0, i:], log_decay[i:]), (whole.b[0, 0, :i].flip(0), log_decay[:i].flip(0))):
        seen = decays.cumsum(0)
        if factors:  # the newest token before i is not decayed
            seen -= decays
        factors.append(torch.linalg.qr(rows.double() * seen.exp_(), mode="r").R)
    return torch.linalg.svdvals(factors[0] @ factors[1].mT)


def row(kind: str, n: int, length: int) -> dict[str, Any]:
    """Measure one case."""
    given = tensors(n, length)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    item, capturing = sampled(kind, given)
    held = sum(tensor.numel() * tensor.element_size() for tensor in item.operator.tensors)
    started = time.process_time()
    results = compute(item, 3, 1e-3)
    found = reading(0, item, 1e-3, results)
    computing, peak = time.process_time() - started, status("VmHWM") - before
    operator, positions = item.operator, found.positions
    values = operator.select(samples=[0], heads=[0]).singular_values([positions[1]])[0, 0, 0].double()
    if not isinstance(operator, ReducedRecurrence):
        del operator
    expected = reference(kind, given, item, positions, found.length)
    shared = min(len(values), len(expected))
    return {
        "layer": kind,
        "n": n,
        "tokens": length,
        "seen": f"{item.operator.batch} x {item.operator.heads} x {found.length}",
        "in the pass, s": capturing,
        "beside it, s": computing,
        "held, MB": held / 1e6,
        "peak, MB": peak / 1e6,
        "ESS": int((values > 1e-3).sum()),
        "reference": int((expected > 1e-3).sum()),
        "error": float((values[:shared] - expected[:shared]).abs().max() / expected[0]),
    }


def run() -> Result:
    """Measure all cases."""
    torch.set_num_threads(1)
    rows, failures = [], []
    for kind, n, length in CASES:
        found = row(kind, n, length)
        rows.append(found)
        print(found, file=sys.stderr, flush=True)
        name = f"{kind}, n = {n}, {length} tokens"
        if found["ESS"] != found["reference"]:
            failures.append(f"{name}: ESS {found['ESS']}, reference {found['reference']}")
        if found["held, MB"] * 1e6 > HELD_BYTES:
            failures.append(f"{name}: {found['held, MB']:.0f} MB held")
        if kind == "gated, diagonal" and n == 64:
            if length == 128 * THOUSAND and found["in the pass, s"] + found["beside it, s"] > SECONDS:
                failures.append(f"{name}: more than {SECONDS} s")
            if found["peak, MB"] * 1e6 > PEAK_BYTES:
                failures.append(f"{name}: a peak of {found['peak, MB']:.0f} MB")
    return Result(
        "A sample of one layer at its defaults: 3 positions, float32 tensors, at most 4 samples x 4 heads",
        rows,
        [
            "seen: samples x heads x tokens; seconds of one core (CPU time); peak: above the layer's own tensors",
            "ESS, reference, error (share of the largest singular value): first sample and head, middle position",
        ],
        failures,
    )


if __name__ == "__main__":
    sys.exit(main([run], __doc__))
