"""Runs the census, and writes its page: `python -m benchmarks.census [--only SOURCE] [--names A,B] [--page FILE]`.

It can be interrupted: outcomes are kept in a file, and those that it holds are not made again.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.census import layer_classes, own_layers, packages, transformers_models
from benchmarks.census.runner import recorded, run
from benchmarks.census.tables import page

SOURCES = {
    "transformers": transformers_models.items,
    "classes": layer_classes.items,
    "packages": packages.items,
    "written": own_layers.items,
}
_LIBRARIES = ("torch", "transformers", "flash-linear-attention", "mamba_ssm")


def main() -> int:
    """Run the items that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SOURCES, action="append", help="one source; may be repeated")
    parser.add_argument("--names", help="of items, with commas between them")
    parser.add_argument("--outcomes", type=Path, default=Path("census.jsonl"), help="file that keeps the outcomes")
    parser.add_argument("--limit", type=int, default=60, help="seconds of processor time for one item")
    parser.add_argument("--page", type=Path, help="write the page to this file")
    parser.add_argument("--recorded", action="store_true", help="run nothing: the page of the outcomes that are there")
    given = parser.parse_args()
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before transformers imports triton, for the kernels of fla
    sources = () if given.recorded else given.only or SOURCES
    chosen = [item for source in sources for item in SOURCES[source]()]
    if given.names:
        chosen = [item for item in chosen if item.name in given.names.split(",")]
    outcomes = recorded(given.outcomes) if given.recorded else []
    for outcome in run(chosen, given.outcomes, limit_seconds=given.limit):
        outcomes.append(outcome)
        print(f"{outcome.source} {outcome.name}: {outcome.verdict} {outcome.problem}", flush=True)
    if given.page is not None:
        known = {(outcome.source, outcome.name) for outcome in outcomes}
        missing: dict[str, list[str]] = {}
        for item in (item for items in SOURCES.values() for item in items()):
            if (item.source, item.name) not in known:
                missing.setdefault(item.source, []).append(item.name)
        given.page.write_text(page(outcomes, _versions(), missing=missing) + "\n", encoding="utf-8")
    return int(any(outcome.verdict in ("silent", "wrong", "crashed") for outcome in outcomes))


def _versions() -> list[str]:
    found = []
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
