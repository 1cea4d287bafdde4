"""The example programs run from beginning to end, each for a few steps, and say what they measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.programs import run_program

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS = 3


def run(name: str, folder: Path) -> tuple[str, Any]:
    """What the program prints, and the JSON it writes. In a process of its own: it sets threads, seeds and logging."""
    command = [EXAMPLES / name, "--steps", str(STEPS), "--out", "out", "--json", "summary.json"]
    libraries = () if name == "plain_loop.py" else ("transformers.trainer", "pytorch_lightning")
    done = run_program(command, folder, imports=libraries, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize(
    ("name", "library", "layers"),
    [
        ("plain_loop.py", "torch", ["blocks.0.mixer", "blocks.1.mixer", "blocks.2.mixer"]),
        ("lightning_text.py", "pytorch_lightning", [f"model.blocks.{k}.mixer" for k in range(3)]),
        (
            "lightning_hybrid.py",
            "transformers",
            [f"model.model.layers.{k}.{mixer}" for k, mixer in enumerate(("mamba", "mamba", "self_attn", "mamba"))],
        ),
    ],
)
def test_a_loop_ends_with_the_sizes_of_every_layer_over_the_run(
    name: str, library: str, layers: list[str], tmp_path: Path
) -> None:
    pytest.importorskip(library)
    printed, summary = run(name, tmp_path)
    assert summary["rows"]
    for row in summary["rows"]:
        assert math.isfinite(row["loss"])
        assert list(row["layers"]) == layers
        for effective, capacity in row["layers"].values():
            assert 0 <= effective <= capacity
    assert "loss" in printed


def test_the_hugging_face_trainer_prints_the_table_and_the_loss(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    printed, summary = run("hf_trainer.py", tmp_path)
    assert [reading["layer"] for reading in summary["readings"]] == [f"backbone.layers.{k}.mixer" for k in range(2)]
    assert {(reading["status"], reading["state_capacity"]) for reading in summary["readings"]} == {("ok", 8.0)}
    assert len(summary["losses"]) == STEPS
    assert all(math.isfinite(loss) for loss in summary["losses"].values())
    assert "state of the memory at step" in printed
    assert f"step {STEPS}: loss" in printed
