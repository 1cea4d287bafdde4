"""Realizes operators as recurrences with a state as small as wanted (theorems 2.1 and 2.2 of the paper)."""
