"""Benchmarks that report ratios within one run. `python -m benchmarks` runs the timings; each module also runs."""
