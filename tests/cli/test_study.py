"""`ess-monitor study`: what it gives in Python, as a table, as JSON and as a page."""

from __future__ import annotations

import re
from pathlib import Path

from ess_monitor import Monitor, MonitorConfig
from ess_monitor.exporters import read_event_log
from ess_monitor.featurizers import GLA
from ess_monitor.report import load_study
from tests.cli.test_main import Run
from tests.report.test_study import folder

__all__ = ["folder"]


def test_study_gives_what_it_gives_in_python(run: Run, folder: Path) -> None:
    answer = run("study", str(folder), "--json", "--resamples", "50", "--by-configuration", "--seed", "4")
    expected = load_study(folder, resamples=50, by_configuration=True, seed=4)
    assert answer.json == {"schema_version": 1, **expected.model_dump(mode="json")}


def test_study_shows_correlations_and_the_grid_and_writes_a_page(run: Run, folder: Path) -> None:
    answer = run("study", str(folder), "--resamples", "50", "--html", "page.html")
    assert answer.status == 0
    assert re.search(r"task +layers +quantity +runs +r with accuracy +95 %", answer.out)
    assert re.search(r"all +all +ESS / demand +16 +[+-]0\.\d\d +[+-]0\.\d\d to [+-]0\.\d\d", answer.out)
    assert re.search(r"mqar +gla +TSS / demand +8 ", answer.out)
    assert re.search(r"all +all +ESS / demand minus TSS / demand +16 +[+-]\d\.\d\d +[+-]\d\.\d\d to", answer.out)
    assert re.search(r"mqar gla, TSS 4, kv_pairs 4 \(2 runs\): metric 0\.\d+, ESS [\d.]+, used 0\.\d+", answer.out)
    assert "Study of 16 runs: accuracy" in (folder / "page.html").read_text()


def test_a_mistake_gives_one_line(run: Run, folder: Path) -> None:
    for arguments, says in (
        (("--metric", "recall"), "metric: no run has 'recall'; give one of accuracy"),
        (("--demand", "pairs"), "demand: no run has the hyperparameter 'pairs'"),
    ):
        answer = run("study", str(folder), *arguments)
        assert answer.status == 2
        assert answer.err.startswith(f"error: {says}")
    assert "does not exist" in run("study", "nowhere").err


def test_hyperparameters_of_a_monitor_are_in_its_log(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    facts = {"kv_pairs": 8, "lr": 1e-3, "task": "mqar", "compiled": True, "note": None}
    exporters = [{"kind": "event_log", "path": str(log)}]
    with Monitor(GLA(16, 2), MonitorConfig(hyperparameters=facts, exporters=exporters)):  # type: ignore[arg-type]
        pass
    started = next(read_event_log(log))
    assert started.data.hyperparameters == facts  # type: ignore[union-attr]
    assert started.data.hyperparameters["compiled"] is True  # type: ignore[union-attr]
