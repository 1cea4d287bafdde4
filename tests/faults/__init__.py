"""Injects faults into a training that has a monitor.

Every case trains a small model twice from the same seed, with and without the monitor. It checks that the results are
bitwise equal, and that the monitor reported the event. `python -m tests.faults` prints the cases as a table.
"""
