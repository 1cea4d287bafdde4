"""Writes scalars to a run of Weights & Biases."""
