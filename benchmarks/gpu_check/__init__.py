"""Checks on a machine with an accelerator what the monitor promises there."""
