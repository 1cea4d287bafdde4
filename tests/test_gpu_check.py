"""The check for machines with an accelerator runs here too, small; what it reports is what its sections found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu_check import __main__ as program
from benchmarks.gpu_check.sections import SECTIONS
from tests.programs import run_program

ROOT = Path(__file__).parents[1]


def test_a_dry_run_of_all_sections_keeps_every_promise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def launch(arguments: list[str], limit: float) -> tuple[int, str, str]:
        command = ["-m", "benchmarks.gpu_check", *arguments]
        done = run_program(command, tmp_path / arguments[1], seconds=limit, cwd=ROOT)
        return done.returncode, done.stdout, done.stderr

    assert program.main(["--dry", "--out", str(tmp_path)], launch=launch) == 0
    lines = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert [line["section"] for line in lines] == list(SECTIONS)
    assert all(line["rows"] for line in lines)
    found = {row["training"]: row["watched equal"] for row in lines[list(SECTIONS).index("losses")]["rows"]}
    assert found == dict.fromkeys(("plain", "deterministic", "autocast", "compiled"), True)
    assert "skipped" in lines[list(SECTIONS).index("tests")]["rows"][0]["tests"]
    assert "every promise that was checked is kept" in capsys.readouterr().out


def test_a_promise_that_is_not_kept_and_a_section_that_ends_early_are_named(tmp_path: Path, capsys) -> None:
    outcomes = {
        "waits": (0, 'noise\ngpu_check {"waits": 3, "ok": false}\n', ""),
        "losses": (124, 'gpu_check {"training": "plain", "ok": true}\n', "ran past its limit of 90 s"),
        "numbers": (0, 'gpu_check {"ok": true}\n', ""),
    }
    failed = program.checked(list(outcomes), tmp_path, dry=True, launch=lambda given, limit: outcomes[given[1]])
    assert failed == ["waits", "losses"]
    lines = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert [(line["status"], len(line["rows"])) for line in lines] == [(0, 1), (124, 1), (0, 1)]
    assert "ran past its limit" in capsys.readouterr().out


def test_without_an_accelerator_it_says_so_and_ends_well(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(program, "HAS_CUDA", False)
    assert program.main([], launch=lambda *_: pytest.fail("nothing is to be started")) == 0
    assert "no accelerator" in capsys.readouterr().out


def test_the_sections_together_end_within_eight_minutes() -> None:
    assert sum(limit for _, limit in SECTIONS.values()) <= program.TOTAL_SECONDS


def test_a_section_that_nobody_knows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--dry", "--only", "waits,speed"])
    assert "speed is none of environment, tests, numbers" in capsys.readouterr().err
