"""Hooks and function patches that see a layer's call, and what leaves them in order."""
