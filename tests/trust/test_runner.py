"""The runner runs what is missing, keeps every result, and resumes; recorded results are judged in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.trust.__main__ import RECORDED, main, select
from benchmarks.trust.catalog import CATALOG, KINDS
from benchmarks.trust.plan import missing
from benchmarks.trust.runner import read_results, record, run_missing, summary
from benchmarks.trust.settings import thresholds_digest
from benchmarks.trust.verdict import judge
from tests.programs import run_program
from tests.trust.stub import action, finding, outcome, result

RUNS = CATALOG[:3]
JOBS = missing(RUNS, [])


class Counting:
    """Counts the jobs that are run, and fails for some."""

    def __init__(self, failing: tuple[str, str] | None = None, stop_after: int | None = None) -> None:
        self.jobs: list[tuple[str, str]] = []
        self.failing, self.stop_after = failing, stop_after

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        if len(self.jobs) == self.stop_after:
            raise KeyboardInterrupt
        self.jobs.append((job["name"], job["variant"]))
        if self.jobs[-1] == self.failing:
            raise ValueError("lost\nand more")
        return outcome(job)


def keys(path: Path) -> set[tuple[str, str]]:
    return {(one["name"], one["variant"]) for one in read_results(path) if "error" not in one}


def test_an_interrupted_collection_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "folder" / "results.jsonl"
    first = Counting(stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        run_missing(RUNS, out, workers=1, work=first)
    assert keys(out) == set(first.jobs) == set(JOBS[:4])
    second = Counting()
    assert run_missing(RUNS, out, workers=1, work=second) == (len(JOBS) - 4, 0)
    assert second.jobs == JOBS[4:]
    third = Counting()
    assert run_missing(RUNS, out, workers=1, work=third) == (0, 0)
    assert third.jobs == []
    assert keys(out) == set(JOBS)


def test_a_failed_job_is_kept_as_failed_and_repeated(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    assert run_missing(RUNS, out, workers=1, work=Counting(failing=JOBS[1])) == (len(JOBS), 1)
    failed = [one for one in read_results(out) if "error" in one]
    assert failed == [{"name": JOBS[1][0], "variant": JOBS[1][1], "error": "ValueError: lost"}]
    assert summary(failed[0]).endswith("ValueError: lost")
    again = Counting()
    assert run_missing(RUNS, out, workers=1, work=again) == (1, 0)
    assert again.jobs == [JOBS[1]]
    assert keys(out) == set(JOBS)


def test_a_line_that_was_cut_off_is_dropped_and_its_job_repeated(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    run_missing(RUNS, out, workers=1, work=Counting())
    out.write_bytes(out.read_bytes()[:-20])
    again = Counting()
    run_missing(RUNS, out, workers=1, work=again)
    assert again.jobs == [JOBS[-1]]
    assert keys(out) == set(JOBS)


@pytest.mark.parametrize(("name", "variant"), [("settings", "control"), ("settings", "auto"), ("thresholds", "auto")])
def test_results_of_other_settings_or_thresholds_do_not_count(name: str, variant: str) -> None:
    results = [outcome({"name": run, "variant": trained}) for run, trained in JOBS]
    assert missing(RUNS, results) == []
    changed = next(k for k, (_, trained) in enumerate(JOBS) if trained == variant)
    results[changed][name] = "other"
    assert JOBS[changed] in missing(RUNS, results)


def test_the_last_result_of_a_job_counts_and_an_error_replaces_none(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    error = {"name": "a", "variant": "auto", "error": "OSError: lost"}
    lines = [result("a", "auto", loss=1.0), result("a", "auto", loss=2.0), error]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [one["loss"] for one in read_results(out)] == [2.0]


def test_results_are_recorded_in_the_order_of_the_catalog(tmp_path: Path) -> None:
    results = [outcome({"name": name, "variant": variant}) for name, variant in reversed(JOBS)]
    unknown = result("no run of the catalog", "auto")
    assert record(RUNS, [unknown, *results], tmp_path / "recorded.gz") == len(JOBS)
    assert read_results(tmp_path / "recorded.gz") == results[::-1]


def test_a_summary_says_what_was_found_and_done() -> None:
    one = result("a", "auto", findings=[finding("collapsed")], actions=[action("applied")], loss=None)
    assert summary(one) == r"a \[auto]: loss not finite, accuracy 0.950, 1 collapsed, treated, 1 s"


@pytest.mark.timeout(600)
def test_jobs_run_on_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "results.jsonl"
    code = (
        "import sys; from pathlib import Path; from benchmarks.trust.catalog import CATALOG\n"
        "from benchmarks.trust.runner import run_missing; from tests.trust.stub import outcome\n"
        "print(run_missing(CATALOG[:3], Path(sys.argv[1]), workers=1 + 1, work=outcome))"
    )
    done = run_program(["-c", code, out], tmp_path, imports=["ray"], seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"({len(JOBS)}, 0)" in done.stdout
    assert keys(out) == set(JOBS)


def test_recorded_results_are_judged_without_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run for run in CATALOG if run.kind == "copy"]
    results = [
        outcome({"name": run.name, "variant": variant})
        for run in runs
        for variant in ("auto", "auto_metric", "control")
    ]
    alarmed = next(one for one in results if one["variant"] == "auto" and one["split"] == "held_out")
    alarmed["findings"] = [finding("collapsed")]
    path = tmp_path / "recorded.jsonl.gz"
    record(CATALOG, results, path)
    arguments = ["--recorded", str(path), "--markdown", str(tmp_path / "t.md"), "--json", str(tmp_path / "t.json")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"Both halves were run with the same thresholds ({thresholds_digest()})" in printed
    assert f"{alarmed['name']}: false alarm at step 1400" in printed
    assert "| auto, with the metric | 0 of 5 (0 to 43 %) |" in (tmp_path / "t.md").read_text()
    assert len(json.loads((tmp_path / "t.json").read_text())["results"]) == 4
    assert main(["--recorded", str(tmp_path / "none.gz")]) == 1


def test_the_command_line_selects_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert select("all", None, None) == list(CATALOG)
    assert {run.split for run in select("held_out", None, None)} == {"held_out"}
    assert {run.kind for run in select("seen", [KINDS[0], KINDS[1]], None)} == {KINDS[0], KINDS[1]}
    assert len(select("all", None, 7)) == 7
    assert main(["--list", "--only", "copy", "--limit", "2"]) == 0
    assert capsys.readouterr().out.count("healthy") == 2


def test_the_recorded_results_are_of_this_catalog_and_of_the_defaults() -> None:
    results = read_results(RECORDED)
    assert missing(CATALOG, results) == [], "the catalog or the defaults have changed: run and record again"
    assert {verdict.split for verdict in judge(results)} == {"held_out", "seen"}
