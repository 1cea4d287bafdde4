"""Checks for every supported layer that the measured operator is the one that the layer applied.

    python -m benchmarks.faithfulness [--json FILE] [--only WORD]      FILE: a list with one object per row

Each row is a small, randomly initialized model of the library's own class. error is the largest max|T u - y| / max|y|
over its layers of that class, in training and in evaluation: u and y are the library's own tensors, T the captured
operator, materialized in float64. TSS and ESS (tolerance 1e-3, middle position, mean over heads or channels and layers)
are at initialization. Kernels of fla run in Triton's interpreter where there is no accelerator.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it on import, and any library may import triton first

import torch

from benchmarks.layers import CASES, Case, measure
from benchmarks.report import Result, machine, show

LIMIT = 1e-5
LIBRARIES = ("transformers", "flash-linear-attention", "mamba_ssm", "triton")


def row(case: Case) -> tuple[dict[str, Any], str | None]:
    """Return the row of a case, and its problem or None."""
    names = ("library", "layer", "error", "state_capacity", "effective_size", "handles", "note")
    if importlib.util.find_spec(case.package) is None:
        missing = f"not run: {case.package} is not installed"
        return dict(zip(names, (case.library, case.layer, None, None, None, [], missing), strict=True)), None
    rows = [measure(case, mode) for mode in case.modes]
    worst = max(rows, key=lambda found: found.error)
    capacity = worst.state_capacity  # None if it grows with the position
    numbers = (worst.error, capacity, worst.effective_size, list(worst.handles), case.note)
    facts = dict(zip(names, (case.library, case.layer, *numbers), strict=True))
    limit = "" if case.tolerance == LIMIT else f" (limit {case.tolerance:g})"
    wrong = worst.error >= case.tolerance or any(found.described != found.measured for found in rows)
    return facts, f"{case.name}: error {worst.error:.1e}{limit}, described {worst.described}" if wrong else None


def main() -> int:
    """Run every case; return 1 if the operator of one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows to FILE")
    parser.add_argument("--only", default="", metavar="WORD", help="run only cases whose name contains WORD")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # the libraries warn about each missing kernel
    rows, wrong = [], []
    for case in CASES:
        if arguments.only.lower() in case.name.lower():
            facts, problem = row(case)
            rows.append(facts)
            wrong += [problem] if problem else []
            print(f"{len(rows)}: {case.name}", file=sys.stderr, flush=True)
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    table = [{**facts, "handles": "; ".join(facts["handles"]) or "none"} for facts in rows]
    show(Result("T u against the library's own output", table, [f"{machine()}", f"{versions}"], wrong))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
