"""Asks of every model type and layer class at hand whether `describe` tells the truth about it."""
