"""The operator that is measured is the operator that the library's layer applied."""

from __future__ import annotations

import pytest

from benchmarks.layers import CASES, Case, measure

RUNS = [pytest.param(case, mode, id=f"{case.name}-{mode}") for case in CASES for mode in case.modes]


@pytest.mark.parametrize(("case", "mode"), RUNS)
def test_t_times_u_is_what_the_layer_computed_and_describe_said_so_before(case: Case, mode: str) -> None:
    pytest.importorskip(case.package)
    row = measure(case, mode)
    assert row.error < case.tolerance
    assert row.described == row.measured
