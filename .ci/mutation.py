"""How many small faults, put into `ess` and `diagnosis` one at a time, the tests of these rooms notice.

Usage: mutation.py [--ess N] [--diagnosis N] [--seed N]

mutmut makes the faults, in a copy of the sources; as many as are asked for are drawn from them. Those that no test
noticed are printed as differences, to be looked at: a message worded otherwise, the same numbers by another way, or a
test that is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("ess_monitor", "integrations", "alerts", "tests", "pyproject.toml")
ROOMS = ("ess", "diagnosis")
SURVIVED = 0
"""Exit code of pytest: all tests passed."""


def results(folder: Path) -> dict[str, int | None]:
    """Mutant -> exit code of its tests; None where they have not run."""
    found: dict[str, int | None] = {}
    for meta in sorted(folder.glob("mutants/ess_monitor/**/*.meta")):
        found |= json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]
    return found


def mutmut(folder: Path, *arguments: str) -> str:
    """What it prints."""
    # Its progress is drawn for a terminal; one process, so that tests are not stopped for being slow.
    done = subprocess.run(
        [sys.executable, "-m", "mutmut", *arguments],
        cwd=folder,
        env={**os.environ, "CI": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return done.stdout


def drawn(names: list[str], counts: dict[str, int], seed: int) -> list[str]:
    """So many of each room, or all there are."""
    chance = random.Random(seed)
    rooms = {room: [name for name in names if name.startswith(f"ess_monitor.{room}.")] for room in counts}
    return [name for room, count in counts.items() for name in chance.sample(rooms[room], min(count, len(rooms[room])))]


def main() -> int:
    """Print the survivors and a line for each room; 1 when something did not run."""
    parser = argparse.ArgumentParser(description="Mutation score of ess and diagnosis.")
    for room, count in zip(ROOMS, (200, 100), strict=True):
        parser.add_argument(f"--{room}", type=int, default=count, help=f"mutants of {room} (default {count})")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in COPIED:
            if (ROOT / name).is_dir():  # links become folders: mutmut copies what it does not follow
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, folder / name)
        said = mutmut(folder, "run", "--max-children", "1", "ess_monitor.ess.none")  # makes them, and runs none
        names = sorted(results(folder))
        if not names:
            print(said[-4000:], "mutation: mutmut made no mutants; its last words are above", sep="\n")
            return 1
        chosen = drawn(names, {room: getattr(options, room) for room in ROOMS}, options.seed)
        print(f"mutation: {len(chosen)} of {len(names)} mutants, seed {options.seed}", flush=True)
        mutmut(folder, "run", "--max-children", "1", *chosen)
        codes = results(folder)
        for name in chosen:
            if codes[name] == SURVIVED:
                print(mutmut(folder, "show", name))
    counts = Counter((name.split(".")[1], codes[name] is None, codes[name] == SURVIVED) for name in chosen)
    for room in ROOMS:
        killed, survived, lost = counts[room, False, False], counts[room, False, True], counts[room, True, False]
        asked = killed + survived + lost
        print(f"mutation: {room}: {killed} of {asked} killed, {survived} survive, {lost} did not run")
    return int(any(codes[name] is None for name in chosen))


if __name__ == "__main__":
    sys.exit(main())
