"""Writes one JSON line for every measurement, finding and action."""
