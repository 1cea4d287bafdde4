"""Checks the autopilot on labeled runs: false alarms, harm and rescues. `python -m benchmarks.trust` runs it."""
