"""Measures time against length at 8 positions, and peak memory, each length in its own process."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise

from benchmarks.report import Result, main

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
MAX_EXPONENT, MAX_GIGABYTES = 1.15, 1.0

CHILD = """
import json, resource, sys, time
from benchmarks.all_positions import recurrence
from ess_monitor.ess import operator_positions
length = int(sys.argv[1])
operator = recurrence(length)
positions = operator_positions(length, 8)
seconds = []
for _ in range(5):
    started = time.perf_counter()
    operator.singular_values(positions)
    seconds.append(time.perf_counter() - started)
try:  # ru_maxrss of a fresh process still holds the peak of the one that started it
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    peak = int(status["VmHWM"].split()[0]) * 1024
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": sorted(seconds)[2], "peak": peak}))
"""


def slope(x: list[float], y: list[float]) -> float:
    """Return the least-squares slope."""
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def run() -> Result:
    """Measure the growth exponent over all lengths, and the peak memory of the process at the longest."""
    measured = {}
    for length in LENGTHS:
        child = subprocess.run([sys.executable, "-c", CHILD, str(length)], capture_output=True, text=True, check=True)
        measured[length] = json.loads(child.stdout)
    seconds = [m["seconds"] for m in measured.values()]
    exponent = slope([math.log(n) for n in LENGTHS], [math.log(s) for s in seconds])
    steps = [None, *(math.log2(b / a) for a, b in pairwise(seconds))]
    rows = [
        {
            "length": length,
            "ms": 1e3 * measured[length]["seconds"],
            "exponent to here": "" if step is None else step,
            "peak of the process, GB": measured[length]["peak"] / 1e9,
        }
        for length, step in zip(LENGTHS, steps, strict=True)
    ]
    peak = measured[LENGTHS[-1]]["peak"] / 1e9
    failures = []
    if exponent > MAX_EXPONENT:
        failures.append(f"growth exponent {exponent:.2f}, target at most {MAX_EXPONENT}")
    if peak > MAX_GIGABYTES:
        failures.append(f"peak memory {peak:.2f} GB, target at most {MAX_GIGABYTES}")
    return Result(
        "Time and memory against length: 8 positions, 8 heads, n = 16, float32",
        rows,
        [f"growth exponent over all lengths: {exponent:.3f}; the peak includes the interpreter, torch and the input"],
        failures,
    )


if __name__ == "__main__":
    sys.exit(main([run], __doc__))
