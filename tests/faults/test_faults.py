from __future__ import annotations

import pytest

from tests.faults.harness import CASES, Case
from tests.faults.table import run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_fault_changes_nothing_and_is_seen(case: Case) -> None:
    outcome, logged = run(case)
    assert outcome.unchanged
    missing = [where for where, seen in outcome.seen.items() if not seen]
    assert not missing, logged
