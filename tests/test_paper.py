"""The experiments of the paper run from beginning to end, each for a few steps, and the page says what came out."""

from __future__ import annotations

import doctest
import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from tests.browser import Browser

pytest.importorskip("ray")
pytest.importorskip("scipy")

from examples.paper import experiment
from examples.paper.__main__ import EXPERIMENTS, load, main
from examples.paper.experiment import SEEDS, SEEN, Experiment, Finding, Run, by_seed, interval, paired, planned, shown

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "paper"
COMMITTED = json.loads((PAGE / "results.json").read_text())
VERDICTS = {"reproduced", "partly", "not reproduced", "open"}


def short(name: str) -> list[Run]:
    """The results of short runs of an experiment, in this process."""
    found = load(name)
    return [{**run, **found.run(run), "seconds": 1.0} for run in planned(found, (0, 1), short=True)]


@pytest.mark.parametrize("name", EXPERIMENTS)
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
    for name in EXPERIMENTS:
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


def test_every_file_and_test_that_covers_a_part_of_the_paper_is_there() -> None:
    text = (PAGE / "coverage.md").read_text()
    named = re.findall(r"`((?:examples|tests|ess_monitor)/[\w./]*)(?:::(\w+))?`", text)
    assert len(named) > 40
    for path, test in named:
        assert (ROOT / path).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"


@pytest.mark.timeout(600)
def test_runs_are_kept_and_a_page_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Browser(tmp_path)  # figures are drawn by it
    command = ["memory_decay", "--short", "--folder", str(tmp_path / "runs"), "--page", str(tmp_path / "page")]
    assert main(command) == 0
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json")}
    assert len(written) == 6
    assert {json.loads(path.read_text())["seed"] for path in written} == set(SEEN), "short runs leave the page's alone"
    assert "<svg" in (tmp_path / "page" / "figure-5a-1.svg").read_text()
    assert "They took 0 minutes in one go" in (tmp_path / "page" / "index.md").read_text()
    assert main(command) == 0
    assert "They took 0 minutes in one go" in (tmp_path / "page" / "index.md").read_text()
    assert {path: path.stat().st_mtime_ns for path in written} == written, "a run that was done was run again"
    next(iter(written)).unlink()
    assert main(command) == 0
    assert "in one go" not in (tmp_path / "page" / "index.md").read_text(), "it did one run, not all"


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


def test_what_is_averaged_within_a_seed_is_no_evidence_of_its_own() -> None:
    first = [{"seed": seed, "value": value} for seed, value in ((0, 1.0), (0, 2.0), (1, 5.0), (2, 9.0))]
    second = [{"seed": seed, "value": value} for seed, value in ((0, 0.5), (0, 0.5), (1, 1.0), (2, None))]
    pairs = paired(first, second, lambda row: row["value"])
    assert pairs == [(0, 0.5), (0, 1.5), (1, 4.0)]
    assert by_seed(pairs) == [1.0, 4.0]
    assert shown(by_seed([])) == "undefined"


def test_the_verdicts_of_the_sweep_follow_its_rules() -> None:
    module = import_module("examples.paper.task_model_sweep")
    settings = [row for row in module.runs((0, 1, 2), short=False) if row["task"] == "mqar"]

    def made(row: Run, collapsing: tuple[str, ...], used: float) -> Run:
        """A run whose ESS is a share of TSS: solved, unless its mixer collapses or its state is full."""
        lost = row["model"] in collapsing and row["kv_pairs"] == 8 and row["state_size"] > 2
        share = 0.1 if lost else min(1.0, used * 4 / row["state_size"])
        accuracy = 0.1 if lost else 0.4 if row["state_size"] == 2 else 0.99 - 0.001 * row["seed"]
        grown = [[step * share * row["state_size"] / 10] * 2 for step in range(11)]
        rising = [step / 10 * accuracy for step in range(11)]
        return {**row, "step": list(range(11)), "accuracy": rising, "ess": grown, "entropy": grown}

    def verdicts(*collapsing: str, used: float = 1.0) -> tuple[str, str]:
        rows = [made(row, collapsing, used) for row in settings]
        return module.saturation(rows).verdict, module.finding_3(rows).verdict

    assert verdicts() == ("reproduced", "not reproduced")
    assert verdicts("gla:beta=1", "wla:beta=1")[1] == "partly"
    assert verdicts("gla:beta=1")[1] == "not reproduced", "WLA does not collapse"
    assert verdicts("gla:beta=16", "wla:beta=16")[1] == "reproduced"
    assert verdicts("gla:beta=16", "wla:beta=16", "la:rope_base=10")[1] == "not reproduced"
    assert verdicts(used=0.1)[0] == "partly", "accuracy is worse at the smallest TSS, but no state is full"
    rows = [made(row, ("wla:beta=1",), 1.0) for row in settings]
    assert module.finding_2(rows).verdict == "not reproduced", "all correlations within runs are 1"
    for row in rows:
        if (row["kv_pairs"], row["state_size"]) == (4, 16) and row["seed"] < 2:
            row["accuracy"] = row["accuracy"][::-1]
    assert module.finding_2(rows).verdict == "partly", "differences of 2, 2 and 0"
    for row in rows:
        if (row["kv_pairs"], row["state_size"]) == (4, 16) and row["seed"] == 2:
            row["accuracy"] = row["accuracy"][::-1]
    assert module.finding_2(rows).verdict == "reproduced"


def test_the_interval_is_that_of_student() -> None:
    mean, low, high = interval([0.5, 0.7, 0.9])
    assert mean == pytest.approx(0.7)
    # t(0.975, 2) = 4.30265; s = 0.2
    assert (low, high) == pytest.approx((0.7 - 4.30265 * 0.2 / 3**0.5, 0.7 + 4.30265 * 0.2 / 3**0.5), rel=1e-4)


def test_the_examples_in_its_docstrings_hold() -> None:
    assert doctest.testmod(experiment).failed == 0
