"""No file of the package can load a pickle or make an object out of YAML."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    {path.resolve() for tree in ("ess_monitor", "integrations", "alerts") for path in (ROOT / tree).rglob("*.py")}
)
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
YAML_CALLS = {"safe_load", "parse", "safe_dump", "load"}
BUILTINS = {"eval", "exec", "compile"}


def unsafe(tree: ast.AST) -> Iterator[str]:
    """What in a module could run a file's content, as `line: what`."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in MODULES or name in ("torch.load", "torch.serialization", "yaml.load"):
                yield f"{node.lineno}: import of {name}"  # type: ignore[attr-defined]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in ("torch.load", "torch.jit.load") and given.get("weights_only") != "True":
            yield f"{node.lineno}: {called} without weights_only=True"
        if called.endswith("read_pickle") or given.get("allow_pickle", "False") != "False":
            yield f"{node.lineno}: {called} reads pickles"
        if called in BUILTINS:
            yield f"{node.lineno}: {called}"
        if called.startswith("yaml.") and "oad" in called and called != "yaml.safe_load":
            safe = called == "yaml.load" and given.get("Loader") in ("_Loader", "yaml.SafeLoader")
            if not safe:
                yield f"{node.lineno}: {called} without a safe loader"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_loads_what_could_run(path: Path) -> None:
    assert list(unsafe(ast.parse(path.read_text(encoding="utf-8")))) == []


def test_all_of_the_package_is_looked_at() -> None:
    names = {path.name for path in SOURCES}
    assert {"weights.py", "config.py", "json_state.py", "lightning.py", "export.py"} <= names


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "yaml.full_load_all(text)",
        "numpy.load(path, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_what_could_run_would_be_found(source: str) -> None:
    assert list(unsafe(ast.parse(source)))


def test_the_loader_of_settings_is_a_safe_one() -> None:
    import yaml

    from ess_monitor import config as yaml_file

    assert issubclass(yaml_file._Loader, yaml.SafeLoader)
    assert not issubclass(yaml_file._Loader, yaml.FullLoader)
