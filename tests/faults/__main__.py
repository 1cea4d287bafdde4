"""Prints the table of the cases: injected fault, training unchanged, event seen."""

from __future__ import annotations

import sys

import torch

if __name__ == "__main__":
    # A spawned worker of a DataLoader imports this file, too, and does not need the cases.
    from tests.faults.table import main

    torch.set_num_threads(1)
    sys.exit(1 if main() else 0)
