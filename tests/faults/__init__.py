"""Faults that are injected into a training that is watched.

Every case trains a small model twice from the same seed, with and without the monitor, and says whether the result is
bitwise the same and whether the monitor told of what happened. `python -m tests.faults` prints them as a table.
"""
