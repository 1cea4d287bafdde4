"""What is built from the tree is what is in the tree, also where links do not work."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
LINKED = {"ess_monitor.alerts": "alerts", "ess_monitor.integrations": "integrations"}
"""Packages whose files lie at the top level of the repository, where `ess_monitor/<name>` is only a link."""


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _package_files() -> dict[str, Path]:
    """Path in the wheel -> file in the tree, links not followed."""
    files = {}
    for package, folder in {"ess_monitor": "ess_monitor", **LINKED}.items():
        links = [ROOT / name.replace(".", "/") for name in LINKED]
        for path in (ROOT / folder).rglob("*"):
            inside_link = any(link == path or link in path.parents for link in links)
            if path.is_file() and not inside_link and "__pycache__" not in path.parts:
                files[f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    return files


def _copy_of_the_tree(to: Path) -> Path:
    """The repository without what git ignores, links kept as links."""
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "build", "dist", "site", "runs",
        "lightning_logs", "artifacts",
    )  # fmt: skip
    return shutil.copytree(ROOT, to, symlinks=True, ignore=ignored)


def _build(tree: Path, *what: str) -> Path:
    """`python -m build` with the tools of this environment, so that nothing is downloaded."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", *what, "."]
    answer = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return tree / "dist"


def _names_in_wheel(dist: Path) -> set[str]:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, and the wheel that was made from that sdist."""
    return _build(_copy_of_the_tree(tmp_path_factory.mktemp("links") / "tree"))


def test_every_package_of_the_tree_is_listed_in_pyproject() -> None:
    in_tree = {
        Path(name).parent.as_posix().replace("/", ".") for name in _package_files() if name.endswith("/__init__.py")
    }
    listed = _pyproject()["tool"]["setuptools"]["packages"]
    assert in_tree == set(listed)
    assert len(listed) == len(set(listed))


def test_every_folder_with_python_files_is_a_package() -> None:
    names = {name for name in _package_files() if name.endswith(".py")}
    assert {f"{Path(name).parent.as_posix()}/__init__.py" for name in names} <= names


def test_every_linked_package_is_mapped_to_its_folder() -> None:
    mapped = _pyproject()["tool"]["setuptools"]["package-dir"]
    assert mapped == {"ess_monitor": "ess_monitor", **LINKED}
    for package, folder in LINKED.items():
        link = ROOT / package.replace(".", "/")
        assert link.is_symlink(), f"{link} must be a relative link to ../{folder}"
        assert link.readlink().as_posix() == f"../{folder}"


def test_wheel_build_holds_the_packages_and_nothing_else(dist: Path) -> None:
    names = {name for name in _names_in_wheel(dist) if ".dist-info/" not in name}
    assert names == set(_package_files())
    assert {"ess_monitor/py.typed", "ess_monitor/integrations/__init__.py"} <= names
    alerts = {name.removeprefix("ess_monitor/alerts/") for name in names if name.startswith("ess_monitor/alerts/")}
    assert {
        "__init__.py",
        "alertmanager/alertmanager.yml",
        "prometheus/ess_monitor.rules.yml",
        "prometheus/file_sd.example.json",
        "prometheus/tests/layers.yml",
        "runbooks/EssMonitorStateCollapsed.md",
    } <= alerts


def test_wheel_build_carries_the_licence_and_the_command(dist: Path) -> None:
    info = {name.split(".dist-info/")[1] for name in _names_in_wheel(dist) if ".dist-info/" in name}
    assert {"licenses/LICENSE", "entry_points.txt", "METADATA"} <= info


def test_wheel_build_is_the_same_where_the_links_are_text_files(dist: Path, tmp_path: Path) -> None:
    tree = _copy_of_the_tree(tmp_path / "tree")
    for package, folder in LINKED.items():
        link = tree / package.replace(".", "/")
        link.unlink()
        link.write_text(f"../{folder}")  # what git checks out on a system without links
    assert _names_in_wheel(_build(tree, "--wheel")) == _names_in_wheel(dist)


def test_sdist_build_holds_what_is_needed_to_test_and_to_document(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt", "mkdocs.yml"}
    for folder in ("benchmarks", "docs", "examples", "tests"):
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in (".pyc", ".pyo"))
        wanted |= {path.relative_to(ROOT).as_posix() for path in files}
    wanted |= {path.relative_to(ROOT).as_posix() for path in _package_files().values()}
    assert wanted - names == set()
    links = tuple(f"{package.replace('.', '/')}/" for package in LINKED)
    assert not any(name.startswith(links) for name in names), "files of a link, twice in the sdist"
