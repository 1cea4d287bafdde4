"""The structure of the package, read off its files: packages, lines, imports, class names.

    python -m tests.architecture [--at REVISION]

prints each package with its files, lines and longest file, and how many imports go against the arrows or in a circle.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ess_monitor"
LINKED = ("alerts", "integrations")
"""Packages whose files lie at the top level of the repository; `ess_monitor/<name>` is only a link to them."""
TREES = ("ess_monitor", *LINKED, "examples", "tests", "benchmarks")

ROOT_MODULES = {"__init__", "monitor", "config", "inspection", "errors"}

ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "validation": {"errors"},
    "records": {"errors"},
    "ess": {"errors", "validation"},
    "featurizers": {"errors", "ess", "validation"},
    "tasks": {"errors", "validation"},
    "runtime": {"errors", "records", "validation"},
    "distributed": {"errors", "records", "runtime", "validation"},
    "capture": {"distributed", "errors", "ess", "records", "validation"},
    "interventions": {"capture", "errors", "ess", "records", "validation"},
    "diagnosis": {"errors", "records", "validation"},
    "evidence": {"capture", "errors", "ess", "records", "validation"},
    "exporters": {"errors", "records", "runtime", "validation"},
    "config": {
        "capture",
        "diagnosis",
        "distributed",
        "errors",
        "evidence",
        "exporters",
        "interventions",
        "runtime",
        "validation",
    },
    "alerts": {"errors", "records", "runtime", "validation"},
    "analysis": {"capture", "config", "errors", "ess", "exporters", "inspection", "records", "validation"},
    "report": {"analysis", "diagnosis", "errors", "exporters", "records", "validation"},
}
"""Package -> the packages it may import, itself apart. What is not listed stands above them all."""

ABOVE_THE_MONITOR = {"alerts", "analysis", "cli", "integrations", "report"}
"""Packages that the monitor must not know. Alerts and reports know nothing of it either: the ones speak of metrics by
name, the others read event logs."""
ONLY_TO_TRAIN = {"featurizers", "tasks"}

STAGES = ("trigger", "queue", "schedule", "results", "replays")
"""Modules of `pipeline` that `Monitor` alone connects."""

ADAPTERS = {"ess_monitor.capture.adapters.featurizers": "featurizers"}
"""Capture adapters, loaded by name once their library is in `sys.modules`. They alone may import it."""


class Import(NamedTuple):
    """One imported module, as an absolute dotted name."""

    module: str
    line: int
    at_start: bool
    """Whether it is imported with the module: not inside a function, and not for types only."""


def python_files(*trees: str) -> list[Path]:
    """Return every Python file of `trees`. The links are left out: what they lead to is found at its own place."""
    files = (path for tree in trees for path in (ROOT / tree).rglob("*.py"))
    return sorted(path for path in files if not any(PACKAGE / name in path.parents for name in LINKED))


def module_name(path: Path) -> str:
    """Return the dotted name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in LINKED:
        parts = ("ess_monitor", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    """`ess_monitor.capture.spec` -> `capture`; the package's own `__init__` -> ``."""
    return ".".join(module.split(".")[1:2])


def imports(path: Path) -> Iterator[Import]:
    """Yield every import in the file, at any depth. `from a import b` counts as `a.b` where `a` is the root package."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_start = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(name.name, node.lineno, id(node) in at_start) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            if module == "ess_monitor":
                names = (f"{module}.{name.name}" for name in node.names)
                yield from (Import(name, node.lineno, id(node) in at_start) for name in names)
            else:
                yield Import(module, node.lineno, id(node) in at_start)


def may_import(module: str) -> set[str]:
    """Return the packages that `module` may import, its own among them."""
    package = package_of(module)
    if package in ARROWS:
        return ARROWS[package] | {package} | ({ADAPTERS[module]} if module in ADAPTERS else set())
    packages = {package_of(module_name(path)) for path in python_files("ess_monitor")} | ABOVE_THE_MONITOR
    if package == "cli":
        return packages - {"integrations"}
    if package == "integrations":
        return packages - {"cli"} - ONLY_TO_TRAIN
    of_logs = {"report"} if module == "ess_monitor" else set()  # `load_run` and `figures_of`, imported when used
    return (packages - ABOVE_THE_MONITOR - ONLY_TO_TRAIN - {""}) | of_logs


def against_the_arrows(path: Path, public: set[str]) -> list[str]:
    """Return the imports of a file that its package may not make; `public` names of the root package are free."""
    module = module_name(path)
    allowed = may_import(module)
    return [
        f"{path.relative_to(ROOT).as_posix()}:{each.line}: {module} must not import {each.module}"
        for each in imports(path)
        if each.module.split(".")[0] == "ess_monitor"
        and each.module not in public
        and package_of(each.module) not in allowed
    ]


def circles() -> list[list[str]]:
    """Return the groups of modules that import each other in a circle when they are imported."""
    files = {module_name(path): path for path in python_files("ess_monitor", *LINKED)}
    graph = {
        name: {each.module for each in imports(path) if each.at_start and each.module in files and each.module != name}
        for name, path in files.items()
    }
    reachable = {name: _reachable(graph, name) for name in graph}
    groups = {tuple(sorted(o for o in reachable[name] if name in reachable[o])) for name in graph}
    return sorted(list(group) for group in groups if len(group) > 1)


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for name in graph[waiting.pop()] - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def class_names() -> dict[str, list[str]]:
    """Return where each class name is defined at the top level of a module of the package."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in python_files("ess_monitor", *LINKED):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found[node.name].append(path.relative_to(ROOT).as_posix())
    return found


def lines_by_folder(revision: str | None = None) -> dict[str, dict[str, int]]:
    """Return folder -> file -> lines of the package, of the working tree or of a revision of the repository."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    if revision is None:
        sources = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in _package_files()}
    else:
        listed = _git("ls-tree", "-r", "--name-only", revision, "ess_monitor", *LINKED).splitlines()
        sources = {name: _git("show", f"{revision}:{name}") for name in listed if name.endswith(".py")}
    for name, text in sources.items():
        found[name.rpartition("/")[0]][name.rpartition("/")[2]] = len(text.splitlines())
    return dict(sorted(found.items()))


def _package_files() -> list[Path]:
    return python_files("ess_monitor", *LINKED)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Packages, files, lines, imports against the arrows, circles.")
    parser.add_argument("--at", metavar="REVISION", help="count the files and lines of a revision instead")
    options = parser.parse_args()
    folders = lines_by_folder(options.at)
    print(f"{'folder':42} files  lines  longest file")
    for folder, files in folders.items():
        longest = max(files, key=lambda name: files[name])
        count = len([name for name in files if name != "__init__.py"])
        print(f"{folder:42} {count:5}  {sum(files.values()):5}  {longest} ({files[longest]})")
    total = sum(sum(files.values()) for files in folders.values())
    print(f"{'all':42} {sum(map(len, folders.values())):5}  {total:5}")
    if options.at is None:
        against = [line for path in _package_files() for line in against_the_arrows(path, set())]
        print(f"imports against the arrows: {len(against)}; circles: {len(circles())}")


if __name__ == "__main__":
    main()
