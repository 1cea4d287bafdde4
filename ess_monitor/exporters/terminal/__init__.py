"""Prints a table of the layers to the terminal."""
