"""The programs for several processes: equal models after interventions, and an end like any other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.eager import EAGER_DIAGNOSIS, NO_EVIDENCE
from tests.exporters.helpers import free_port
from tests.programs import Program

EXAMPLES = Path(__file__).parents[1] / "examples"
EAGER = {
    "every_n_steps": 4,
    "overhead_budget_ratio": None,
    "capture": {"heads": None},
    "diagnosis": EAGER_DIAGNOSIS,
    "evidence": NO_EVIDENCE,
    "autopilot": {"mode": "auto", "lag_steps": 2, "cooldown_steps": 8},
}


def environment() -> dict[str, str]:
    changed = {"OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        changed["GLOO_SOCKET_IFNAME"] = "lo"
    return {**os.environ, **changed}


def program(name: str, folder: Path, *more: str) -> list[str]:
    return [str(EXAMPLES / name), "--steps", "24", "--settings", json.dumps(EAGER), "--out", str(folder), *more]


@contextmanager
def started(count: int, folder: Path, command: list[str]) -> Iterator[list[Program]]:
    """The ranks of a program, with the environment that torchrun gives them."""
    shared = {
        **environment(),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "example",
    }
    ranks: list[Program] = []
    try:
        for rank in range(count):
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(Program(command, folder / f"rank-{rank}", imports=["pytorch_lightning"], env=env))
        yield ranks
    finally:
        for each in ranks:
            each.kill()


@pytest.mark.parametrize(
    ("name", "count", "more"),
    [("ranks_lightning.py", 4, []), ("ranks_lightning.py", 2, ["--strategy", "fsdp2"]), ("ranks_fsdp2.py", 4, [])],
)
def test_every_rank_holds_the_same_model_after_the_interventions(
    name: str, count: int, more: list[str], tmp_path: Path
) -> None:
    with started(count, tmp_path, program(name, tmp_path, "--json", str(tmp_path / "summary.json"), *more)) as ranks:
        assert [rank.wait(200) for rank in ranks] == [0] * count, [rank.errors for rank in ranks]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["equal"], summary["alike"]) == (True, True)
    assert len(summary["ranks"]) == count
    assert len({rank["fingerprint"] for rank in summary["ranks"]}) == 1
    for rank in summary["ranks"]:
        assert any("pull_to_identity" in action and "applied" in action for action in rank["actions"])
        assert rank["measurements"]["ok"] == 6
        assert rank["measurements"]["skipped"] == 0


@pytest.mark.parametrize("more", [[], ["--no-monitor"]], ids=["monitored", "alone"])
@pytest.mark.parametrize("name", ["ranks_lightning.py", "ranks_fsdp2.py"])
def test_a_run_whose_rank_is_killed_ends_as_it_would_without_the_monitor(
    name: str, more: list[str], tmp_path: Path
) -> None:
    with started(2, tmp_path, program(name, tmp_path, "--die", "1:12", *more)) as ranks:
        assert ranks[1].wait(200) == -9, ranks[1].errors
        assert ranks[0].wait(60) in (1, -6), ranks[0].errors  # it meets the closed connection


def test_torchrun_names_the_rank_that_was_killed_and_ends_the_other(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += program("ranks_lightning.py", tmp_path, "--die", "1:12")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    ends = dict(re.findall(r"rank\s*: (\d+) \(local_rank.*?exitcode\s*: (-?\d+)", done.stderr, re.DOTALL))
    assert ends.pop("1") == "-9", done.stderr[-3000:]
    assert ends.get("0", "1") in ("1", "-6", "-15"), done.stderr[-3000:]
