"""Prints the table of the cases: injected, training unchanged, event seen."""

from __future__ import annotations

import sys

import torch

if __name__ == "__main__":
    # A spawned worker of a DataLoader imports this file too, and needs no case.
    from tests.faults.table import main

    torch.set_num_threads(1)
    sys.exit(1 if main() else 0)
