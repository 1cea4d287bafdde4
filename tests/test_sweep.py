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

from ess_monitor.report import load_study
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
    run = sweep.grid(["mqar"], ["gla"], [0], steps=10)[0]
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
    models = ["la", "gla", "gla:beta=1", "gla:beta=16"]
    demands = {"mqar": [4, 8], "selective_copying": [2, 6]}
    grids = [
        sweep.grid(list(sweep.TASKS), models, range(2), steps, state_sizes=[4, 8], demands=demands, warmup_steps=warmup)
        for steps, warmup in ((10, 0), (20, 0), (10, 50))
    ]
    runs = [run for each in grids for run in each]
    assert len({run["run_id"] for run in runs}) == len(runs) == 3 * (2 + 2 + 1) * len(models) * 2 * 2
    assert {run["kv_pairs"] for run in runs if run["task"] == "mqar"} == {4, 8}
    assert not any("kv_pairs" in run for run in runs if run["task"] != "mqar")
    assert {run["tokens_to_copy"] for run in runs if run["task"] == "selective_copying"} == {2, 6}
    assert {run["vocab_size"] for run in runs if run["task"] == "compression"} == {16}
    assert not any(set(run["run_id"]) & set(":=/ ") for run in runs), "ids are names of files"


def test_the_name_of_a_model_says_its_featurizer_and_options(sweep: ModuleType) -> None:
    assert sweep.mixer("la") == ("la", {})
    assert sweep.mixer("gla:beta=16:gate_rank=8") == ("gla", {"beta": 16.0, "gate_rank": 8})
    run = sweep.grid(["mqar"], ["wla:beta=2"], [7], 1, state_sizes=[8], demands={"mqar": [2]})[0]
    net = sweep.network(run)
    assert [(type(block.mixer).__name__, block.mixer.beta, block.mixer.state_capacity) for block in net.blocks] == [
        ("WLA", 2.0, 8)
    ] * 2
    with pytest.raises(ValueError, match=r"'gpt' is not one of gla, gla_s6, la, s6, sa, wla"):
        sweep.mixer("gpt:beta=1")
    with pytest.raises(ValueError, match="'beta' in 'gla:beta' is not an option with a number, such as beta=16"):
        sweep.mixer("gla:beta")


def test_compression_is_read_from_the_features_at_the_last_token_alone(sweep: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    for task, last_alone in (("compression", True), ("mqar", False), ("selective_copying", False)):
        run = sweep.grid([task], ["gla"], [0], 1)[0]
        net = sweep.network(run)
        net.decoder.register_forward_pre_hook(lambda _, inputs: (_without_last(inputs[0]),))
        first, second = (sweep.data(run, 1, seed).batch(range(1))[0] for seed in (0, 1))
        assert torch.equal(net(first), net(second)) == last_alone, task


def _without_last(features: Any) -> Any:
    changed = features.clone()
    changed[:, -1] = 0
    return changed


@pytest.mark.timeout(300)
def test_a_study_of_a_sweep_knows_its_grid(sweep: ModuleType, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    options = {"learning_rate": 5e-3, "warmup_steps": 5, "clip_norm": 1.0}
    grid = sweep.grid(["mqar"], ["wla:beta=1"], [0], 4, state_sizes=[2, 4], demands={"mqar": [4, 8]}, **options)
    threads = torch.get_num_threads()
    try:
        results = {run["run_id"]: sweep.train(run, None, str(tmp_path)) for run in grid}
    finally:
        torch.set_num_threads(threads)
    study = load_study(tmp_path, resamples=0)
    assert (study.metric, study.demand) == ("accuracy", "kv_pairs")
    assert {(cell.featurizer, cell.state_capacity, cell.demand) for cell in study.cells} == {
        (run["model"], float(run["state_size"]), float(run["kv_pairs"])) for run in grid
    }
    assert len(study.cells) == len(grid) == 4
    for run in study.runs:
        result = results[run.name]
        assert run.hyperparameters["learning_rate"] == result["learning_rate"] == 5e-3
        assert run.hyperparameters["beta"] == 1.0
        assert run.metric == pytest.approx(result["accuracy"]), "both are of the held-out samples, after the last step"


def test_a_first_step_is_that_of_the_warm_up_and_of_the_clipped_gradient(sweep: ModuleType, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    taken: list[tuple[float, float]] = []

    class Recording(torch.optim.AdamW):  # type: ignore[misc, name-defined]
        def step(self, closure: Any = None) -> Any:
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
            taken.append((self.param_groups[0]["lr"], float(norm)))
            return super().step(closure)

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Recording)
        try:
            for settings in ({"warmup_steps": 4, "clip_norm": 1e-3}, {}):
                run = sweep.grid(["mqar"], ["la"], [0], 6, learning_rate=8e-3, **settings)[0]
                sweep.train(run, None, str(tmp_path))
        finally:
            torch.set_num_threads(threads)
    assert [rate for rate, _ in taken[:6]] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 8e-3, 8e-3])
    assert [norm for _, norm in taken[:6]] == pytest.approx([1e-3] * 6, rel=1e-2)
    assert {rate for rate, _ in taken[6:]} == {8e-3}
    assert all(norm > 1e-2 for _, norm in taken[6:])


def test_an_unknown_model_is_an_error_that_names_the_known_ones(sweep: ModuleType, tmp_path: Path) -> None:
    done = run_program([SWEEP, "--models", "gla,gpt", "--folder", tmp_path], tmp_path, imports=["ray"])
    assert done.returncode == 2
    assert "'gpt' is not one of gla, gla_s6, la, s6, sa, wla" in done.stderr
    done = run_program([SWEEP, "--kv-pairs", "4,16", "--folder", tmp_path], tmp_path, imports=["ray"])
    assert done.returncode == 2
    assert "kv_pairs" in done.stderr
    assert "32" in done.stderr
