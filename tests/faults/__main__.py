"""Prints the table of the cases: injected, training unchanged, event seen."""

from __future__ import annotations

import sys

import torch

from tests.faults.table import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(1 if main() else 0)
