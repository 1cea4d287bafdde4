"""Runs the timing benchmarks and the gradient tables: `python -m benchmarks`."""

from __future__ import annotations

import sys

from benchmarks import all_positions, attention, exporter_cost, gradient_equality, length_scaling, step_overhead
from benchmarks.report import main

if __name__ == "__main__":
    everything = [
        all_positions.run,
        length_scaling.run,
        attention.run,
        step_overhead.run,
        exporter_cost.size,
        exporter_cost.run,
        gradient_equality.run,
        gradient_equality.definition,
    ]
    sys.exit(main(everything, __doc__))
