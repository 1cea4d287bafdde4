"""The files of the page of recipes do what the page says. Its programs run with those of the other pages."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from ess_monitor.alerts import export
from ess_monitor.config import MonitorConfig
from ess_monitor.exporters import read_event_log
from ess_monitor.runtime import termination
from tests.programs import run_program

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def block(section: str, language: str) -> str:
    """The first fence of that language in a section of the page."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found, section
    return found[1]


def test_the_settings_of_the_cli_build_the_callback(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(block("LightningCLI", "yaml"))
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from pytorch_lightning.cli import LightningCLI\n"
        "from pytorch_lightning.demos.boring_classes import BoringModel\n"
        "cli = LightningCLI(BoringModel, run=False, save_config_callback=None, args=['--config', 'config.yaml'])\n"
        "[ess] = [c for c in cli.trainer.callbacks if type(c).__name__ == 'ESSMonitorCallback']\n"
        "print(ess.config.layers.include, ess.config.diagnosis.metric_solved, ess.config.exporters[0].kind)\n"
    )
    ended = run_program(["-c", code], tmp_path, cwd=tmp_path, imports=["pytorch_lightning"])
    assert "('*.mixer',) 0.95 prometheus" in ended.stdout, ended.stderr


@pytest.mark.skipif(os.name != "posix", reason="this system has no SIGTERM")
def test_a_job_that_slurm_ends_is_recorded_as_terminated(tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(block("Slurm", "sh"))
    (tmp_path / "train.py").write_text(block("Slurm", "python"))
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} "$@"\n')  # srun python train.py
    srun.chmod(0o755)
    environ = {k: v for k, v in os.environ.items() if k not in termination.SCHEDULER_VARIABLES}
    environ |= {"PATH": f"{srun.parent}:{environ['PATH']}", "SLURM_JOB_ID": "4711", "PYTHONPATH": str(ROOT)}
    log = tmp_path / "runs" / "ess_events.jsonl"
    job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environ, start_new_session=True)
    try:
        ends = time.monotonic() + 120
        while not (log.exists() and b'"event":"measurement"' in log.read_bytes()):
            assert job.poll() is None, "the job ended by itself"
            assert time.monotonic() < ends, "nothing was measured"
            time.sleep(0.1)
        assert len(list((tmp_path / "targets").iterdir())) == 1
        os.killpg(job.pid, signal.SIGTERM)  # the shell ends at once, the training after its sinks
        while b'"event":"run_finished"' not in log.read_bytes():
            assert time.monotonic() < ends, "the run was not ended"
            time.sleep(0.1)
        job.wait(timeout=60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    [ended] = [event for event in read_event_log(log) if event.event == "run_finished"]
    assert ended.data.status == "terminated"
    assert not list((tmp_path / "targets").iterdir())


def test_the_job_of_kubernetes_is_one_that_the_pod_monitor_selects_and_scrapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod: dict[str, Any] = yaml.safe_load(block("Kubernetes", "yaml"))["spec"]["template"]
    [container] = pod["spec"]["containers"]
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable.get("value", "a secret of the cluster"))
    [exporter] = MonitorConfig.load().exporters
    [port] = container["ports"]
    assert (exporter.kind, exporter.host, exporter.port) == ("prometheus", "0.0.0.0", port["containerPort"])  # type: ignore[union-attr]

    export(tmp_path)
    monitor = yaml.safe_load((tmp_path / "prometheus" / "podmonitor.example.yml").read_text())["spec"]
    assert monitor["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert [each["port"] for each in monitor["podMetricsEndpoints"]] == [port["name"]]
    assert "ess-monitor/run-id" in pod["metadata"]["labels"]
