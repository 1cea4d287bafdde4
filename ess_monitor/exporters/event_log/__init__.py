"""The event log: one JSON line for every measurement, finding and action."""
