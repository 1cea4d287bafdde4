"""The arrows of docs/architecture.md, read off the import statements, and the public names."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ess_monitor"
INTEGRATIONS = ROOT / "integrations"
LINKED = ("alerts", "integrations")
"""Rooms whose files lie at the top level of the repository; `ess_monitor/<name>` is only a link to them."""
TREES = ("ess_monitor", *LINKED, "examples", "tests", "benchmarks")

PUBLIC_NAMES = {
    "Action",
    "AutopilotConfig",
    "CaptureConfig",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "Description",
    "DiagnosisConfig",
    "EssMonitorError",
    "ExporterError",
    "Finding",
    "LayerFilter",
    "LayerInfo",
    "Measurement",
    "Monitor",
    "MonitorConfig",
    "NoLayersError",
    "OperatorError",
    "PartError",
    "Profile",
    "Reading",
    "RuntimeConfig",
    "capture_operators",
    "describe",
    "profile",
    "register_capture",
}

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
    "exporters": {"errors", "records", "runtime", "validation"},
    "config": {"capture", "diagnosis", "distributed", "errors", "exporters", "interventions", "runtime", "validation"},
    "alerts": {"errors", "records", "validation"},
    "report": {"errors", "exporters", "records", "validation"},
}
"""Room -> the rooms it may import, itself apart. What is not listed stands above them all."""

ABOVE_THE_MONITOR = {"alerts", "cli", "integrations", "report"}
"""Rooms that the monitor must not know. Alerts and reports know nothing of it either: the ones speak of metrics by
name, the others read event logs."""
ONLY_TO_TRAIN = {"featurizers", "tasks"}

ADAPTERS = {"ess_monitor.capture.adapters.featurizers": "featurizers"}
"""Capture adapters, loaded by name once their library is in `sys.modules`. They alone may import it."""

FRAMEWORKS = {
    "accelerate",
    "composer",
    "fla",
    "jax",
    "lightning",
    "mamba_ssm",
    "pytorch_lightning",
    "ray",
    "transformers",
}

LINES_OF_A_FILE = 400


class Import(NamedTuple):
    """One imported module, as an absolute dotted name."""

    module: str
    line: int


def _python_files(*trees: str) -> list[Path]:
    """Every Python file of `trees`. The links are left out: what they lead to is found at its own place."""
    files = (path for tree in trees for path in (ROOT / tree).rglob("*.py"))
    return sorted(path for path in files if not any(PACKAGE / name in path.parents for name in LINKED))


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in LINKED:
        parts = ("ess_monitor", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str:
    """`ess_monitor.capture.adapters.featurizers` -> `capture`; the package's own `__init__` -> ``."""
    return ".".join(module.split(".")[1:2])


def _imports(path: Path) -> Iterator[Import]:
    """Every import in the file, at any depth. `from a import b` counts as `a.b` where that is a module of ours."""
    package = _module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (Import(name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            if module == "ess_monitor":
                yield from (Import(f"{module}.{name.name}", node.lineno) for name in node.names)
            else:
                yield Import(module, node.lineno)


def _may_import(module: str) -> set[str]:
    """Rooms that `module` may import, its own among them."""
    room = _room(module)
    if room in ARROWS:
        return ARROWS[room] | {room} | ({ADAPTERS[module]} if module in ADAPTERS else set())
    rooms = {_room(_module_name(path)) for path in _python_files("ess_monitor")} | ABOVE_THE_MONITOR
    if room == "cli":
        return rooms - {"integrations"}
    if room == "integrations":
        return rooms - {"cli"} - ONLY_TO_TRAIN
    return rooms - ABOVE_THE_MONITOR - ONLY_TO_TRAIN - {""}


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", _python_files("ess_monitor", *LINKED), ids=_relative)
def test_imports_follow_the_arrows(path: Path) -> None:
    module = _module_name(path)
    allowed = _may_import(module)
    public = {f"ess_monitor.{name}" for name in PUBLIC_NAMES}
    against = [
        f"{_relative(path)}:{line}: {module} must not import {imported}"
        for imported, line in _imports(path)
        if imported.split(".")[0] == "ess_monitor" and imported not in public and _room(imported) not in allowed
    ]
    assert not against, "\n".join(against)


@pytest.mark.parametrize("room", sorted(ARROWS))
def test_public_names_of_the_package_are_not_a_way_round_the_arrows(room: str) -> None:
    paths = [path for path in _python_files("ess_monitor", *LINKED) if _room(_module_name(path)) == room]
    assert paths, f"no room {room!r} is left in ess_monitor/: take it out of ARROWS"
    public = {f"ess_monitor.{name}" for name in PUBLIC_NAMES}
    against = [f"{_relative(path)}:{line}" for path in paths for name, line in _imports(path) if name in public]
    assert not against, f"rooms import each other, not the package's front door: {against}"


def test_no_room_imports_the_adapters_of_capture_by_name() -> None:
    files = _python_files("ess_monitor", *LINKED)
    assert {_module_name(path) for path in files} >= set(ADAPTERS)
    against = [f"{_relative(path)}:{line}" for path in files for name, line in _imports(path) if name in ADAPTERS]
    assert not against, f"an adapter is loaded by capture's registry once its library is there: {against}"


def test_the_package_imports_no_framework() -> None:
    against = [
        f"{_relative(path)}:{line}: {name}"
        for path in _python_files("ess_monitor")
        for name, line in _imports(path)
        if name.split(".")[0] in FRAMEWORKS
    ]
    assert not against, f"frameworks belong into integrations/ and into adapters that capture loads lazily: {against}"


def test_integrations_are_imported_by_their_installed_name_only() -> None:
    against = [
        f"{_relative(path)}:{line}: {name}"
        for path in _python_files(*TREES)
        for name, line in _imports(path)
        if name.split(".")[0] in {"integrations", "alerts"}
    ]
    assert not against, f"the bare name makes a second copy of every class; import ess_monitor.<name>: {against}"


@pytest.mark.parametrize("path", _python_files(*TREES), ids=_relative)
def test_every_file_is_small_and_parses_under_python_3_10(path: Path) -> None:
    text = path.read_text()
    ast.parse(text, filename=str(path), feature_version=(3, 10))
    lines = len(text.splitlines())
    assert lines <= LINES_OF_A_FILE, f"{_relative(path)} has {lines} lines: split it"


def test_the_public_names_are_the_documented_ones() -> None:
    package = importlib.import_module("ess_monitor")
    assert set(package.__all__) == PUBLIC_NAMES
    assert [name for name in sorted(PUBLIC_NAMES) if not hasattr(package, name)] == []


def test_importing_the_package_loads_no_extra_and_starts_nothing() -> None:
    code = (
        "import json, sys, threading; import ess_monitor; "
        "print(json.dumps([sorted(sys.modules), [t.name for t in threading.enumerate()]]))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT.anchor)
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
    modules, threads = json.loads(answer.stdout)
    unwanted = FRAMEWORKS | {"prometheus_client", "tensorboard", "typer"}
    unwanted |= {f"ess_monitor.{room}" for room in ONLY_TO_TRAIN | ABOVE_THE_MONITOR}
    assert "ess_monitor.monitor" in modules
    assert sorted(unwanted & set(modules)) == []
    assert threads == ["MainThread"]
