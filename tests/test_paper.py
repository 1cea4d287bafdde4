"""The experiments of the paper run from beginning to end, each for a few steps, and the page says what came out."""

from __future__ import annotations

import doctest
import json
from importlib import import_module
from pathlib import Path

import pytest

from tests.browser import Browser

pytest.importorskip("ray")
pytest.importorskip("scipy")

from examples.paper import experiment
from examples.paper.__main__ import EXPERIMENTS, UNPUBLISHED, load, main
from examples.paper.experiment import SEEDS, SEEN, Experiment, Finding, Run, interval, planned

PAGE = Path(__file__).parents[1] / "docs" / "paper"
COMMITTED = json.loads((PAGE / "results.json").read_text())
VERDICTS = {"reproduced", "partly", "not reproduced", "open"}


def short(name: str) -> list[Run]:
    """The results of short runs of an experiment, in this process."""
    found = load(name)
    return [{**run, **found.run(run), "seconds": 1.0} for run in planned(found, (0, 1), short=True)]


@pytest.mark.parametrize("name", [*EXPERIMENTS, *UNPUBLISHED])
def test_an_experiment_runs_and_its_results_can_be_kept(name: str) -> None:
    rows = short(name)
    found = load(name).findings(json.loads(json.dumps(rows)))
    assert found
    assert {each.verdict for each in found} <= VERDICTS
    for each in found:
        assert each.claim
        assert each.rule
        assert each.result
        assert each.figures, "every finding has a picture"


def test_no_seed_of_the_page_was_seen_before() -> None:
    assert not set(SEEN) & set(SEEDS)
    for name in (*EXPERIMENTS, *UNPUBLISHED):
        assert len(load(name).seeds) >= 3
        assert set(load(name).seeds) <= set(SEEDS)


def test_the_committed_page_has_the_numbers_that_the_runs_give() -> None:
    assert [each["experiment"] for each in COMMITTED] == list(EXPERIMENTS)
    text = (PAGE / "index.md").read_text()
    for each in COMMITTED:
        found = load(each["experiment"]).findings(each["runs"])
        assert [(one.name, one.verdict) for one in found] == [(one["name"], one["verdict"]) for one in each["findings"]]
        for one in found:
            assert f"## {one.name}\n" in text
            assert f"**Verdict: {one.verdict}.**" in text


def test_the_committed_runs_are_those_of_the_settings() -> None:
    for each in COMMITTED:
        found = load(each["experiment"])
        for settings, row in zip(found.runs(found.seeds, False), each["runs"], strict=True):
            assert settings == {name: row[name] for name in settings}


@pytest.mark.timeout(600)
def test_runs_are_kept_and_a_page_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Browser(tmp_path)  # figures are drawn by it
    command = ["memory_decay", "--short", "--folder", str(tmp_path / "runs"), "--page", str(tmp_path / "page")]
    assert main(command) == 0
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json")}
    assert len(written) == 6
    assert "<svg" in (tmp_path / "page" / "figure-5a-1.svg").read_text()
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written, "a run that was done was run again"


def test_a_run_that_fails_is_named_and_no_page_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(settings: Run) -> Run:
        raise ValueError("no such net")

    def none(rows: list[Run]) -> list[Finding]:
        raise AssertionError("nothing is found in runs that failed")

    failing = Experiment("memory_decay", lambda seeds, short: [{"seed": seed} for seed in seeds], broken, none)
    module = import_module("examples.paper.memory_decay")
    monkeypatch.setattr(module, "EXPERIMENT", failing)
    assert main(["memory_decay", "--folder", str(tmp_path), "--page", str(tmp_path / "page")]) == 1
    assert "ValueError: no such net" in capfd.readouterr().err
    assert not (tmp_path / "page").exists()


def test_the_interval_is_that_of_student() -> None:
    mean, low, high = interval([0.5, 0.7, 0.9])
    assert mean == pytest.approx(0.7)
    # t(0.975, 2) = 4.30265; s = 0.2
    assert (low, high) == pytest.approx((0.7 - 4.30265 * 0.2 / 3**0.5, 0.7 + 4.30265 * 0.2 / 3**0.5), rel=1e-4)


def test_the_examples_in_its_docstrings_hold() -> None:
    assert doctest.testmod(experiment).failed == 0
