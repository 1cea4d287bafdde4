"""Which versions of a library are read: each one in an environment of its own, without installing torch again.

Usage: matrix.py [--only WORD] [--lowest] [--oldest LIBRARY] [--again] [--seconds N] [--folder PATH]

The versions are those in LOWEST and the newest patch of every minor version after them; with --lowest, the oldest and
the newest of each library; with --oldest, that of one library alone, without asking the index which there are. A
virtual environment of each is made below --folder. Its packages come first; everything else is taken from the
environment that runs this file. In it `python -m benchmarks.versions` reads every small model of the library, and
compares T u with the layer's output. Environments and results are kept: a run that was interrupted goes on, and --again
measures anew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LOWEST = {"transformers": "4.57.1", "flash-linear-attention": "0.4.0"}
TRITON = "triton==3.6.0"  # for versions of fla before 0.6, whose kernels a later one refuses
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")


def newest_patches(found: Iterable[str], lowest: str) -> list[str]:
    """Return `lowest` and the newest patch of every minor version from there on, oldest first.

    >>> newest_patches(["4.57.1", "5.0.0", "4.57.6", "4.56.9", "5.1.0rc1"], "4.57.1")
    ['4.57.1', '4.57.6', '5.0.0']
    """
    patches: dict[tuple[int, int], Version] = {}
    for version in map(Version, found):
        if version >= Version(lowest) and not version.is_prerelease:
            minor = (version.major, version.minor)
            patches[minor] = max(version, patches.get(minor, version))
    return [str(version) for version in sorted({Version(lowest), *patches.values()})]


def available(library: str) -> list[str]:
    """Ask the package index for the versions of a library."""
    listed = subprocess.run(
        (*PIP, "index", "versions", library), capture_output=True, text=True, check=True, timeout=300
    ).stdout
    line = re.search(r"Available versions: (.+)", listed)
    if line is None:
        raise SystemExit(f"matrix: the package index lists no versions of {library}")
    return line[1].split(", ")


def requirements(library: str, version: str) -> tuple[str, ...]:
    """Return what has to be in the environment of a version; torch is there already."""
    older = (TRITON,) if library == "flash-linear-attention" and Version(version) < Version("0.6") else ()
    return (f"{library}=={version}", f"torch=={metadata.version('torch')}", *older)


def make_environment(folder: Path, wanted: Iterable[str], seconds: float) -> Path:
    """Make the environment of one version, with what it needs and ours has not, and return its interpreter."""
    python, done = folder / "bin" / "python", folder / "installed"
    if done.exists():
        return python
    subprocess.run((sys.executable, "-m", "venv", "--without-pip", "--clear", folder), check=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    options = ("--python", python, "install", "--quiet", "--no-compile")
    command = (*PIP, *options, *wanted)
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds)
    done.touch()
    return python


def measure(folder: Path, library: str, version: str, seconds: float) -> dict[str, Any]:
    """Return what was found with one version: outcome and reason of every layer, or why it could not be tried."""
    try:
        python = make_environment(folder, requirements(library, version), seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"not installed within {seconds:.0f} s"}
    except subprocess.CalledProcessError as error:
        return {"error": "not installed: " + ((error.stderr or "").strip().splitlines() or [str(error)])[-1]}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = (python, "-m", "benchmarks.versions", library)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {seconds:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    found = json.loads(done.stdout.splitlines()[-1])
    if found["version"] != version:
        return {"error": f"version {found['version']} was imported"}
    return found


def lines(library: str, results: dict[str, dict[str, Any]]) -> list[str]:
    """Return the rows of the table. Neighboring versions with the same outcomes share one."""
    groups: list[tuple[list[str], dict[str, Any]]] = []
    for version, found in results.items():
        if groups and groups[-1][1] == _outcomes(found):
            groups[-1][0].append(version)
        else:
            groups.append(([version], _outcomes(found)))
    return [line for versions, outcomes in groups for line in _group(library, versions, outcomes)]


def _outcomes(found: dict[str, Any]) -> dict[str, Any]:
    return {"error": found["error"]} if "error" in found else found["layers"]


def _group(library: str, versions: list[str], outcomes: dict[str, Any]) -> list[str]:
    span = versions[0] if len(versions) == 1 else f"{versions[0]} to {versions[-1]} ({len(versions)})"
    if "error" in outcomes:
        return [f"| {library} | {span} | - | - | - | {outcomes['error']} |"]
    by_kind = {kind: [n for n, (k, _) in outcomes.items() if k == kind] for kind in ("read", "skipped", "wrong")}
    missing = [name for name, (kind, _) in outcomes.items() if kind == "absent"]
    notes = [f"{name}: {outcomes[name][1]}" for kind in ("wrong", "skipped") for name in by_kind[kind]]
    notes += [f"not in this version: {', '.join(missing)}"] if missing else []
    counts = " | ".join(str(len(by_kind[kind])) for kind in by_kind)
    return [f"| {library} | {span} | {counts} | {'; '.join(notes) or ' '} |"]


def main() -> int:
    """Measure every version that has no result yet, and print the table; return 1 if a layer is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="only versions whose `library==version` has WORD")
    parser.add_argument("--lowest", action="store_true", help="only the oldest and the newest of each library")
    parser.add_argument("--oldest", choices=LOWEST, help="only the oldest version of this library")
    parser.add_argument("--again", action="store_true", help="measure versions that have a result again")
    parser.add_argument("--seconds", type=float, default=600, help="limit of one version, for each of its two steps")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix", help="where environments are made")
    options = parser.parse_args()
    table, status = ["| library | version | read | skipped | wrong | |", "|---|---|---|---|---|---|"], 0
    for library, lowest in LOWEST.items():
        if options.oldest not in (None, library):
            continue
        versions = [lowest] if options.oldest else newest_patches(available(library), lowest)
        results = {}
        for version in versions if not options.lowest else dict.fromkeys((versions[0], versions[-1])):
            name = f"{library}=={version}"
            if options.only not in name:
                continue
            kept = options.folder / f"{name}.json"
            if options.again or not kept.exists():
                print(name, file=sys.stderr, flush=True)
                found = measure(options.folder / name, library, version, options.seconds)
                kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            results[version] = json.loads(kept.read_text(encoding="utf-8"))
        status |= any(
            "error" in found or any(k == "wrong" for k, _ in found["layers"].values()) for found in results.values()
        )
        table += lines(library, results)
    print("\n".join(table))
    return status


if __name__ == "__main__":
    sys.exit(main())
