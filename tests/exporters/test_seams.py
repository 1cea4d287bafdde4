"""The shared files know no sink, and an exporter of a user's own keeps every promise of the built-in ones."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

import tests.exporters.test_contract as contract
from ess_monitor.exporters import Exporter, ExporterHub
from ess_monitor.records import Measurement, RunInfo, RunStatus, Snapshot
from tests.exporters.helpers import measurement, run_info, snapshot

ROOM = Path(__file__).parents[2] / "ess_monitor" / "exporters"
SHARED = {"base", "channel", "evidence", "framework_logger", "hub", "log", "scalars"}
WIRING = {"__init__", "config"}
"""They name every sink; nothing else in this folder may."""
SINKS = {path.name for path in ROOM.iterdir() if path.is_dir() and (path / "__init__.py").exists()}


def _imports(path: Path) -> set[str]:
    """Every module that the file imports, at any depth. `from a import b` counts as `a` and as `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write imports in full"
            found.update((node.module or "", *(f"{node.module}.{name.name}" for name in node.names)))
    return found


def test_the_folder_holds_the_shared_files_and_the_sinks_only() -> None:
    assert {path.stem for path in ROOM.glob("*.py")} == SHARED | WIRING
    assert sorted(SINKS) == ["event_log", "prometheus", "tensorboard", "terminal", "wandb"]


@pytest.mark.parametrize("name", sorted(SHARED))
def test_a_shared_file_imports_no_sink(name: str) -> None:
    forbidden = {f"ess_monitor.exporters.{other}" for other in SINKS | WIRING - {"__init__"}}
    forbidden |= {"prometheus_client", "rich", "tensorboard"}
    imported = _imports(ROOM / f"{name}.py")
    assert [
        module for module in sorted(imported) if any(f"{module}.".startswith(f"{sink}.") for sink in forbidden)
    ] == []
    assert "ess_monitor.exporters" not in imported, "the package's front door imports every sink"


@pytest.mark.parametrize("sink", sorted(SINKS))
def test_a_sink_imports_no_other_sink(sink: str) -> None:
    others = tuple(f"ess_monitor.exporters.{other}" for other in SINKS - {sink})
    imported = {module for path in (ROOM / sink).rglob("*.py") for module in _imports(path)}
    assert [module for module in sorted(imported) if module.startswith(others)] == []


class OneLinePerLayer:
    """The least an exporter can be: the three methods, and nothing of this package but the records."""

    name = "one_line_per_layer"
    inline = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_open = False

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        self.path.touch()
        self.is_open = True

    def export(self, measurement: Measurement) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            for reading in measurement.readings:
                print(reading.step, repr(reading.layer), reading.effective_size, file=file)

    def close(self, status: RunStatus) -> None:
        if self.is_open:
            with self.path.open("a", encoding="utf-8") as file:
                print(status, file=file)
        self.is_open = False


@pytest.fixture
def make(tmp_path: Path) -> Callable[[], Exporter]:
    return lambda: OneLinePerLayer(tmp_path / "lines.txt")


CONTRACT = [
    test for name, test in vars(contract).items() if name.startswith("test_") and "make" in test.__annotations__
]


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda test: test.__name__.removeprefix("test_"))
def test_an_exporter_of_a_user_keeps_the_promises(
    promise: Callable[..., None], make: Callable[[], Exporter], tmp_path: Path
) -> None:
    promise(make, tmp_path) if "tmp_path" in promise.__annotations__ else promise(make)


def test_the_contract_is_what_the_built_in_exporters_are_held_to() -> None:
    assert len(CONTRACT) >= 12


def test_an_exporter_of_a_user_is_served_by_the_hub(make: Callable[[], Exporter], tmp_path: Path) -> None:
    hub = ExporterHub([make()])
    hub.start(run_info(), lambda: snapshot())
    hub.export(measurement(100))
    hub.close("finished", timeout_seconds=30)
    assert (tmp_path / "lines.txt").read_text().splitlines() == [
        "100 'blocks.0.mixer' 4.0",
        "100 'blocks.1.mixer' 4.0",
        "finished",
    ]
