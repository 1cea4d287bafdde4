"""The live table in a terminal."""
