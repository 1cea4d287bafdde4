"""The arrows of docs/architecture.md, read off the import statements, and the public names."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture import (
    ABOVE_THE_MONITOR,
    ADAPTERS,
    ARROWS,
    LINKED,
    ONLY_TO_TRAIN,
    PACKAGE,
    ROOT,
    ROOT_MODULES,
    STAGES,
    TREES,
    against_the_arrows,
    circles,
    class_names,
    imports,
    lines_by_folder,
    module_name,
    package_of,
    python_files,
)

INTEGRATIONS = ROOT / "integrations"

PUBLIC_NAMES = {
    "Action",
    "AutopilotConfig",
    "CaptureCheck",
    "CaptureConfig",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "Description",
    "DiagnosisConfig",
    "EssMonitorError",
    "Evidence",
    "EvidenceConfig",
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
    "StateEvidence",
    "capture_operators",
    "check_capture",
    "describe",
    "figures_of",
    "load_run",
    "profile",
    "register_capture",
}

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
FILES_OF_A_FOLDER = 14
LINES_OF_THE_MONITOR = 250


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", python_files("ess_monitor", *LINKED), ids=_relative)
def test_imports_follow_the_arrows(path: Path) -> None:
    public = {f"ess_monitor.{name}" for name in PUBLIC_NAMES}
    against = against_the_arrows(path, public)
    assert not against, "\n".join(against)


@pytest.mark.parametrize("room", sorted(ARROWS))
def test_public_names_of_the_package_are_not_a_way_round_the_arrows(room: str) -> None:
    paths = [path for path in python_files("ess_monitor", *LINKED) if package_of(module_name(path)) == room]
    assert paths, f"no room {room!r} is left in ess_monitor/: take it out of ARROWS"
    public = {f"ess_monitor.{name}" for name in PUBLIC_NAMES}
    against = [f"{_relative(path)}:{line}" for path in paths for name, line, _ in imports(path) if name in public]
    assert not against, f"rooms import each other, not the package's front door: {against}"


def test_no_package_imports_the_adapters_of_capture_by_name() -> None:
    files = python_files("ess_monitor", *LINKED)
    assert {module_name(path) for path in files} >= set(ADAPTERS)
    against = [f"{_relative(path)}:{line}" for path in files for name, line, _ in imports(path) if name in ADAPTERS]
    assert not against, f"an adapter is loaded by capture's registry once its library is there: {against}"


def test_the_package_imports_no_framework() -> None:
    against = [
        f"{_relative(path)}:{line}: {name}"
        for path in python_files("ess_monitor")
        for name, line, _ in imports(path)
        if name.split(".")[0] in FRAMEWORKS
    ]
    assert not against, f"frameworks belong into integrations/ and into adapters that capture loads lazily: {against}"


def test_integrations_are_imported_by_their_installed_name_only() -> None:
    against = [
        f"{_relative(path)}:{line}: {name}"
        for path in python_files(*TREES)
        for name, line, _ in imports(path)
        if name.split(".")[0] in {"integrations", "alerts"}
    ]
    assert not against, f"the bare name makes a second copy of every class; import ess_monitor.<name>: {against}"


@pytest.mark.parametrize("path", python_files(*TREES), ids=_relative)
def test_every_file_is_small_and_parses_under_python_3_10(path: Path) -> None:
    text = path.read_text()
    ast.parse(text, filename=str(path), feature_version=(3, 10))
    lines = len(text.splitlines())
    assert lines <= LINES_OF_A_FILE, f"{_relative(path)} has {lines} lines: split it"


def test_the_root_of_the_package_holds_these_modules_and_packages_only() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_MODULES


def test_no_folder_of_the_package_holds_too_many_files() -> None:
    counts = {folder: len(set(files) - {"__init__.py"}) for folder, files in lines_by_folder().items()}
    assert {folder: count for folder, count in counts.items() if count > FILES_OF_A_FOLDER} == {}


def test_the_monitor_can_be_read_like_the_picture() -> None:
    assert len((PACKAGE / "monitor.py").read_text(encoding="utf-8").splitlines()) <= LINES_OF_THE_MONITOR


def test_the_stages_of_a_sample_do_not_know_each_other() -> None:
    modules = {f"ess_monitor.pipeline.{stage}" for stage in STAGES}
    against = [
        f"{stage}: {name}"
        for stage in STAGES
        for name, _, _ in imports(PACKAGE / "pipeline" / f"{stage}.py")
        if name in modules
    ]
    assert against == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles() == []


def test_no_two_classes_bear_one_name() -> None:
    twice = {name: places for name, places in class_names().items() if len(places) > 1}
    assert twice.pop("ESSMonitorCallback"), "the callback has one name in every integration, on purpose"
    assert twice == {}


def test_the_public_names_are_the_documented_ones() -> None:
    package = importlib.import_module("ess_monitor")
    assert set(package.__all__) == PUBLIC_NAMES
    assert [name for name in sorted(PUBLIC_NAMES) if not hasattr(package, name)] == []


def test_importing_the_package_loads_no_extra_and_starts_nothing() -> None:
    code = (
        "import json, sys, threading; import ess_monitor; "
        "[getattr(ess_monitor, name) for name in ess_monitor.__all__ if name not in ('figures_of', 'load_run')]; "
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
