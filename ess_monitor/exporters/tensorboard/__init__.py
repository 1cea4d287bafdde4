"""Writes scalars, images and text to TensorBoard."""
