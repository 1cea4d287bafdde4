"""Serves HTTP(S) for the /metrics endpoint."""
