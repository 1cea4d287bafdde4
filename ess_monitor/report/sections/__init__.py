"""Sections of the report pages, one a file."""
