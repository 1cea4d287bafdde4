"""The sweep over Ray: every run has its result, and an interrupted sweep goes on where it stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.programs import run_program
from tests.scripts import load_script

pytest.importorskip("ray")

SWEEP = Path(__file__).parents[1] / "examples" / "sweep.py"
COMMAND = [sys.executable, "-u", str(SWEEP), "--tasks", "mqar", "--models", "wla", "--seeds", "3", "--steps", "10"]


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    return load_script(SWEEP)


def results(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.timeout(600)
def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    command = [*COMMAND, "--folder", str(folder), "--json", str(tmp_path / "rows.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as first:
        assert first.stdout is not None
        printed = []
        for line in first.stdout:
            printed.append(line)
            if line.startswith("1 of 3"):
                first.send_signal(signal.SIGINT)
                break
        printed += first.stdout.readlines()
        assert first.wait(120) == 130, "".join(printed)
    assert "give the same command again to resume" in printed[-1]
    kept = results(folder)
    assert 1 <= len(kept) < 3
    assert not [result["error"] for result in kept.values() if "error" in result]
    written = {name: (folder / name).stat().st_mtime_ns for name in kept}

    second = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"3 runs, {len(kept)} of them done before" in second.stdout
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == written, "a run that was done was run again"
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert sorted(row["seed"] for row in rows) == [0, 1, 2]
    assert len({row["run_id"] for row in rows}) == 3
    for row in rows:
        assert 0 <= row["accuracy"] <= 1
        assert list(row["utilization"]) == ["blocks.0.mixer", "blocks.1.mixer"]
        assert all(0 <= value <= 1 for value in row["utilization"].values())


def test_a_result_counts_only_if_it_is_whole_and_of_these_settings(sweep: ModuleType, tmp_path: Path) -> None:
    run = sweep.grid(["mqar"], ["gla"], 1, steps=10)[0]
    path = tmp_path / "result.json"
    assert sweep.finished(path, run) is None
    path.write_text('{"torn')
    assert sweep.finished(path, run) is None
    sweep.keep(path, {**run, "error": "RuntimeError: lost"})
    assert sweep.finished(path, run) is None
    sweep.keep(path, {**run, "accuracy": 0.5})
    assert sweep.finished(path, run) == {**run, "accuracy": 0.5}
    assert sweep.finished(path, {**run, "steps": 11}) is None
    assert list(tmp_path.iterdir()) == [path]


def test_every_run_of_a_grid_has_an_id_of_its_own(sweep: ModuleType) -> None:
    runs = sweep.grid(list(sweep.TASKS), list(sweep.MODELS), 3, steps=10)
    longer = sweep.grid(list(sweep.TASKS), list(sweep.MODELS), 3, steps=20)
    ids = {run["run_id"] for run in runs + longer}
    assert len(ids) == len(runs + longer) == 2 * 3 * len(sweep.MODELS) * 3


def test_an_unknown_model_is_an_error_that_names_the_known_ones(sweep: ModuleType, tmp_path: Path) -> None:
    done = run_program([SWEEP, "--models", "gla,gpt", "--folder", tmp_path], tmp_path, imports=["ray"])
    assert done.returncode == 2
    assert "'gpt' is not one of gla, gla_s6, la, s6, sa, wla" in done.stderr
