"""The notebook of the examples runs from the beginning to the end, and shows each result once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "look_at_a_run.ipynb"
HTML, FIGURE = "text/html", "application/vnd.plotly.v1+json"


def _kind(output: Any) -> str:
    return next((kind for kind in (FIGURE, HTML) if kind in output.get("data", {})), "text")


@pytest.mark.filterwarnings("ignore:Proactor event loop")
def test_the_notebook_runs_and_shows_each_result_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, 4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code"), "kept without outputs"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [[each for each in of if each.get("name") != "stderr"] for of in cells]
    shown = [[_kind(each) for each in of] for of in outputs]
    assert shown == [[], [HTML], [HTML], ["text"], [HTML], [FIGURE], [FIGURE], [FIGURE], [FIGURE], [HTML]]
    assert "Backbone, finished" in outputs[3][0].text
