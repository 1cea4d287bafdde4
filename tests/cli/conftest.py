"""The command with a directory of models, for all tests of commands."""

from __future__ import annotations

from tests.cli.test_main import run

__all__ = ["run"]
