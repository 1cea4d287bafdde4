"""Checks on an accelerator what the monitor promises there. One command, 8 minutes at most.

    python -m benchmarks.gpu_check [--out FOLDER] [--only NAME,...] [--dry]

Every section runs in a process of its own with a limit of its own: one that breaks the device's context does not take
the others along. What a section finds is appended to FOLDER/gpu_check.jsonl when it ends, one JSON object a line, and
shown in a table. The end status is 1 where a promise is not kept. Without an accelerator it says so and ends with 0.
--dry runs every section small, on the CPU as well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.sections import SECTIONS
from benchmarks.gpu_check.training import HAS_CUDA, Row
from benchmarks.report import Result, show

TOTAL_SECONDS = 480.0
_MARK = "gpu_check "
"""Begins each line of a section that is a row."""

Launch = Callable[[list[str], float], tuple[int, str, str]]
"""`(arguments, limit in seconds) -> (end status, output, errors)` of a section in a process of its own."""


def launched(arguments: list[str], limit: float) -> tuple[int, str, str]:
    """Run a section; end status 124 where it ran past its limit."""
    try:
        command = [sys.executable, "-m", "benchmarks.gpu_check", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        return done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        texts = [(text or b"").decode() if not isinstance(text, str) else text for text in (late.stdout, late.stderr)]
        return 124, texts[0], f"{texts[1]}\nran past its limit of {limit:.0f} s"


def run_section(name: str, dry: bool) -> None:
    """Print the rows of a section."""
    for row in SECTIONS[name][0](dry):
        print(_MARK + json.dumps(row, default=str), flush=True)


def checked(names: Sequence[str], folder: Path, *, dry: bool, launch: Launch = launched) -> list[str]:
    """Run sections; return those that did not end well, or in which a promise is not kept."""
    failed, ends = [], time.monotonic() + TOTAL_SECONDS
    for name in names:
        begin = time.monotonic()
        limit = 300.0 if dry else min(SECTIONS[name][1], ends - begin)
        status, output, errors = 124, "", "no time was left"
        if limit > 10:
            status, output, errors = launch(["--section", name, *(["--dry"] if dry else [])], limit)
        lines = [line for line in output.splitlines() if line.startswith(_MARK)]
        rows: list[Row] = [json.loads(line.removeprefix(_MARK)) for line in lines]
        problem = errors[-600:] if status else ""
        seconds = round(time.monotonic() - begin, 1)
        line = {"section": name, "status": status, "seconds": seconds, "rows": rows, "problem": problem}
        with (folder / "gpu_check.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        is_failed = status != 0 or any(row.get("ok") is False for row in rows)
        failed += [name] if is_failed else []
        show(Result(f"{name}, {seconds} s{': FAILED' if is_failed else ''}", rows, [problem] if problem else []))
    return failed


def main(arguments: Sequence[str] | None = None, *, launch: Launch = launched) -> int:
    """Run the check; return the end status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="of gpu_check.jsonl")
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="NAME,...", help="sections to run")
    parser.add_argument("--dry", action="store_true", help="small, on a CPU as well")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    given: Any = parser.parse_args(arguments)
    if given.section:
        run_section(given.section, given.dry)
        return 0
    names = given.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(SECTIONS)}")
    if not HAS_CUDA and not given.dry:
        print("no accelerator: torch.cuda.is_available() is False, and nothing was checked; --dry runs it on the CPU")
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    failed = checked(names, given.out, dry=given.dry, launch=launch)
    print(f"NOT KEPT: {', '.join(failed)}" if failed else "every promise that was checked is kept")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
