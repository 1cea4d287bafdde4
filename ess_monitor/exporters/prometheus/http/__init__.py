"""The HTTP server of the /metrics endpoint."""
