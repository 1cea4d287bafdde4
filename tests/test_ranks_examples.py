"""The programs for several processes, under torchrun: equal models after interventions, and an end like any other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.eager import EAGER_DIAGNOSIS, NO_EVIDENCE

EXAMPLES = Path(__file__).parents[1] / "examples"
EAGER = {
    "every_n_steps": 4,
    "overhead_budget_ratio": None,
    "capture": {"heads": None},
    "diagnosis": EAGER_DIAGNOSIS,
    "evidence": NO_EVIDENCE,
    "autopilot": {"mode": "auto", "lag_steps": 2, "cooldown_steps": 8},
}


def torchrun(name: str, ranks: int, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    program = [str(EXAMPLES / name), "--steps", "24", "--settings", json.dumps(EAGER), "--out", str(folder)]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return subprocess.run(
        [*command, *program, *more], env=environment, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "ranks", "more"),
    [("ranks_lightning.py", 4, []), ("ranks_lightning.py", 2, ["--strategy", "fsdp2"]), ("ranks_fsdp2.py", 4, [])],
)
def test_every_rank_holds_the_same_model_after_the_interventions(
    name: str, ranks: int, more: list[str], tmp_path: Path
) -> None:
    done = torchrun(name, ranks, tmp_path, "--json", str(tmp_path / "summary.json"), *more)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["equal"], summary["alike"]) == (True, True)
    assert len(summary["ranks"]) == ranks
    assert len({rank["fingerprint"] for rank in summary["ranks"]}) == 1
    for rank in summary["ranks"]:
        assert any("pull_to_identity" in action and "applied" in action for action in rank["actions"])
        assert rank["measurements"]["ok"] == 6
        assert rank["measurements"]["skipped"] == 0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["ranks_lightning.py", "ranks_fsdp2.py"])
def test_a_run_whose_rank_is_killed_ends_as_it_would_without_the_monitor(name: str, tmp_path: Path) -> None:
    for more in ([], ["--no-monitor"]):
        done = torchrun(name, 2, tmp_path, "--die", "1:12", *more)
        assert done.returncode == 1, done.stdout + done.stderr[-3000:]
        # torchrun names every rank that failed, and how. The other one meets the closed connection, or is ended.
        ends = dict(re.findall(r"rank\s*: (\d+) \(local_rank.*?exitcode\s*: (-?\d+)", done.stderr, re.DOTALL))
        assert ends.pop("1") == "-9", done.stderr[-3000:]
        assert ends.get("0", "1") in ("1", "-6", "-15"), done.stderr[-3000:]
