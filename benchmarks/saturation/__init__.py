"""Measures how well saturation is told from a state that is merely full. `python -m benchmarks.saturation` runs it."""
