"""`python -m benchmarks`: every benchmark in one run."""

from __future__ import annotations

import sys

from benchmarks import all_positions, attention, length_scaling, step_overhead
from benchmarks.report import main

if __name__ == "__main__":
    sys.exit(main([all_positions.run, length_scaling.run, attention.run, step_overhead.run], __doc__))
