"""Dependencies: pinned, installed as pinned, not withdrawn, and without a known vulnerability.

Usage: audit.py [--pip-audit PATH] [--offline-is-fine]

The last two need the network. What cannot be checked is said, and fails the audit unless --offline-is-fine is given.
A vulnerability service that does not answer looks to pip-audit like one that knows of no package, so it is first asked
for a release that is known to be vulnerable.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
VULNERABLE = "jinja2==2.4.1"  # CVE-2014-1402 and later ones
SECONDS = 600


def pins() -> dict[str, str]:
    """Name -> version of every pin that applies to this interpreter and platform."""
    lines = (line.partition("#")[0].strip() for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines())
    requirements = [Requirement(line) for line in lines if line]
    return {
        canonicalize_name(each.name): Version(next(iter(each.specifier)).version).public
        for each in requirements
        if each.marker is None or each.marker.evaluate()
    }


def installed() -> dict[str, str]:
    """Name -> version of everything that is installed here, without ourselves and without local labels (`+cpu`)."""
    found = {
        canonicalize_name(each.metadata["Name"]): Version(each.version).public for each in metadata.distributions()
    }
    return {name: version for name, version in found.items() if name != "ess-monitor"}


def withdrawn() -> list[str] | None:
    """Pins that the index has yanked; None when no index answers."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        if _run([*command, "--report", str(report), "--requirement", str(CONSTRAINTS)]) != 0:
            return None
        items = json.loads(report.read_text(encoding="utf-8"))["install"]
    return [f"{each['metadata']['name']}=={each['metadata']['version']}" for each in items if each.get("is_yanked")]


def vulnerabilities(pip_audit: str, requirements: Iterable[str]) -> tuple[list[str], list[str]] | None:
    """What is known against these requirements, and those that the service does not know; None when it is silent."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "requirements.txt"), Path(folder, "answer.json")
        asked.write_text("\n".join(requirements) + "\n", encoding="utf-8")
        arguments = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
        _run([pip_audit, *arguments, "--output", str(answer), "--requirement", str(asked)])
        try:
            found: list[dict[str, Any]] = json.loads(answer.read_text(encoding="utf-8"))["dependencies"]
        except (OSError, ValueError, KeyError):
            return None
    known = [
        f"{each['name']}=={each['version']}: {vulnerability['id']}, fixed in "
        f"{', '.join(vulnerability['fix_versions']) or 'no release yet'}"
        for each in found
        for vulnerability in each.get("vulns", ())
    ]
    return known, [re.split(r"[=<>]", each["name"])[0] for each in found if "skip_reason" in each]


def _run(command: list[str]) -> int:
    try:
        return subprocess.run(command, capture_output=True, timeout=SECONDS, check=False).returncode
    except (OSError, subprocess.TimeoutExpired):
        return -1


def main() -> int:
    """Print what was checked; 1 when something is wrong, 2 when something could not be checked."""
    parser = argparse.ArgumentParser(description="Audit the pinned dependencies.")
    parser.add_argument("--pip-audit", default="pip-audit", help="the program")
    parser.add_argument("--offline-is-fine", action="store_true", help="what cannot be checked is said, and no failure")
    options = parser.parse_args()
    wrong: list[str] = []
    unchecked: list[str] = []

    pinned, here = pins(), installed()
    others = [
        f"{name} {here[name]}, not {pinned[name]}" for name in pinned if here.get(name, pinned[name]) != pinned[name]
    ]
    wrong += [f"installed otherwise than pinned: {each}" for each in others]
    print(
        f"audit: {len(pinned)} pins apply here; {len(here.keys() & pinned)} installed, {len(others)} in another version"
    )

    yanked = withdrawn()
    if yanked is None:
        unchecked.append("whether a pin was yanked: the package index does not answer")
    else:
        wrong += [f"yanked by its authors: {each}" for each in yanked]
        print(f"audit: {len(yanked)} pins were yanked")

    canary = vulnerabilities(options.pip_audit, [VULNERABLE])
    if canary is None or not canary[0]:
        unchecked.append(f"vulnerabilities: pip-audit or its service is not here ({VULNERABLE} passes as harmless)")
    else:
        everything = {**here, **pinned}
        known, unknown = vulnerabilities(options.pip_audit, (f"{n}=={v}" for n, v in sorted(everything.items()))) or (
            [],
            [],
        )
        wrong += [f"vulnerable: {each}" for each in known]
        unchecked += [f"vulnerabilities of {each}: not known to the service" for each in unknown]
        print(f"audit: {len(everything) - len(unknown)} packages looked up, {len(known)} known vulnerabilities")

    for each in wrong:
        print(f"audit: WRONG: {each}")
    for each in unchecked:
        print(f"audit: NOT CHECKED: {each}")
    return 1 if wrong else 2 if unchecked and not options.offline_is_fine else 0


if __name__ == "__main__":
    sys.exit(main())
