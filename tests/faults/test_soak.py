from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults import soak

SMALL = soak.Figures(step=0, resident_bytes=10**9, blocks=10**6, threads=3, file_handles=9, log_bytes=4000)
GOOD = soak.Report(SMALL, SMALL, SMALL, samples=10, measured=10, scrapes=1, seconds=1.0, unchanged=True)


@pytest.mark.parametrize(
    ("field", "more", "told"),
    [
        ("resident_bytes", 2**25, "resident_bytes grew by 33554432"),
        ("blocks", 2_001, "blocks grew by 2001"),
        ("threads", 1, "threads grew by 1"),
        ("file_handles", 1, "file_handles grew by 1"),
        ("log_bytes", 10**6, "a file of the log has 1004000 bytes"),
    ],
)
def test_growth_beyond_a_limit_is_told(field: str, more: int, told: str) -> None:
    assert GOOD.problems == []
    end = replace(SMALL, **{field: getattr(SMALL, field) + more})
    assert replace(GOOD, end=end).problems == [told]


def test_a_lost_sample_and_a_changed_model_are_told() -> None:
    assert replace(GOOD, measured=9, unchanged=False).problems == [
        "9 of 10 samples were measured",
        "the model was changed",
    ]


def test_growth_ends_the_command_with_an_error_and_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grown = replace(GOOD, end=replace(SMALL, threads=4))
    monkeypatch.setattr(soak, "run", lambda folder, steps: grown)
    assert soak.main(["--steps", "10", "--json", str(tmp_path / "figures.json")]) == 1
    assert "threads grew by 1" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text())["end"]["threads"] == 4
    monkeypatch.setattr(soak, "run", lambda folder, steps: GOOD)
    assert soak.main([]) == 0
