from __future__ import annotations

import pytest

from tests.faults.harness import CASES, Case
from tests.faults.table import main, run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_fault_changes_nothing_and_is_seen(case: Case) -> None:
    outcome, logged = run(case)
    assert outcome.unchanged
    missing = [where for where, seen in outcome.seen.items() if not seen]
    assert not missing, logged


def test_a_case_that_raises_is_a_row_of_the_table_and_counts_as_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.faults.table.CASES", [Case("odd", "nothing", lambda injection: 1 / 0)])  # type: ignore[arg-type, return-value]
    assert main() == 1
    assert "0 of 1 cases hold" in capsys.readouterr().out
