"""docs/supported-layers.md says of every layer that is checked what it is, and with which versions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.layers import CASES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "supported-layers.md").read_text()
LIBRARIES = sorted({case.library for case in CASES})


def rows(section: str) -> list[list[str]]:
    """Cells of the first table under a heading, without its head."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_table_of_a_library_lists_every_layer_that_is_checked(library: str) -> None:
    listed = {name for row in rows(library) for name in re.findall(r"`(\w+)`", row[0])}
    assert listed >= {case.layer for case in CASES if case.library == library}


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_handles_in_the_table_are_those_that_are_tested(library: str) -> None:
    """Of a layer with several variants the table says what the best of them has."""
    for row in rows(library):
        cases = [case for case in CASES if case.library == library and f"`{case.layer}`" in row[0]]
        assert cases, f"{row[0]} is in the table and is not checked"
        decay, alpha = (not row[column].startswith("none") for column in (3, 4))
        assert decay == any(case.pulled for case in cases), row
        assert alpha == any(case.scaled for case in cases), row


@pytest.mark.parametrize("package", ["torch", "transformers", "flash-linear-attention", "triton"])
def test_the_versions_are_those_that_the_tests_run_with(package: str) -> None:
    [version] = re.findall(rf"^{package}==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    table = PAGE.split("\n## Versions\n")[1]
    assert re.search(rf"\b{package}\b.*\b{re.escape(version)}\b", table, re.IGNORECASE)
