"""What `make matrix` finds of a version, tried with the one that is installed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.version import Version
from torch import nn

from benchmarks.layers import CASES, Case
from benchmarks.versions import outcome
from tests.scripts import load_script

ROOT = Path(__file__).parents[1]
BY_NAME = {case.name: case for case in CASES}
LLAMA = BY_NAME["transformers LlamaAttention (sdpa, grouped keys)"]


def matrix() -> ModuleType:
    return load_script(ROOT / ".ci" / "matrix.py")


def not_causal() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    model, args, kwargs = LLAMA.build()
    model.config.is_causal = False  # type: ignore[union-attr]
    return model, args, kwargs


def failing() -> Any:
    raise AttributeError("module transformers has no attribute Zamba9Config")


@pytest.mark.parametrize("name", [LLAMA.name, "transformers MambaMixer"])
def test_a_layer_is_read_with_the_installed_version(name: str) -> None:
    assert outcome(BY_NAME[name]) == ("read", "")


@pytest.mark.parametrize(
    ("case", "expected", "reason"),
    [
        (replace(LLAMA, build=failing), "absent", "no attribute Zamba9Config"),
        (replace(LLAMA, layer="Zamba9Attention"), "absent", "no Zamba9Attention in the model"),
        (replace(LLAMA, build=not_causal), "skipped", "not causal"),
        (replace(LLAMA, layer="LlamaMLP"), "wrong", "in no row of describe"),
        (replace(LLAMA, tolerance=0.0), "wrong", "T u differs by"),
        (replace(LLAMA, mixed=lambda call: 1 / 0), "wrong", "ZeroDivisionError"),
    ],
)
def test_what_is_not_read_has_another_outcome_and_the_reason(case: Case, expected: str, reason: str) -> None:
    found, why = outcome(case)
    assert found == expected
    assert reason in why


def test_the_row_of_the_installed_version_has_the_number_of_cases_that_the_suite_reads() -> None:
    [installed] = re.findall(r"^transformers==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    table = (ROOT / "docs" / "supported-layers.md").read_text().split("| transformers | read |")[1]
    for first, last, read in re.findall(r"^\| ([\d.]+)(?: to ([\d.]+))? \| (\d+) \|", table, re.MULTILINE):
        if Version(first) <= Version(installed) < Version(f"{last or first}.99"):
            assert int(read) == sum(case.library == "transformers" for case in CASES)
            return
    raise AssertionError(f"no row for {installed}")


def test_of_every_minor_version_the_newest_patch_is_tried_and_the_lowest_that_is_allowed() -> None:
    found = ["4.57.1", "5.0.0", "4.57.6", "4.56.9", "5.1.0rc1", "5.0.10", "5.0.9"]
    assert matrix().newest_patches(found, "4.57.1") == ["4.57.1", "4.57.6", "5.0.10"]


def test_versions_of_one_outcome_share_a_row_and_one_that_could_not_be_tried_says_why() -> None:
    layers = {"A": ("read", ""), "B": ("skipped", "eager"), "C": ("absent", "")}
    results = {
        "5.0": {"layers": layers},
        "5.1": {"layers": dict(layers)},
        "5.2": {"error": "not installed"},
        "5.3": {"layers": {"A": ("wrong", "T u differs by 1.0")}},
    }
    assert matrix().lines("transformers", results) == [
        "| transformers | 5.0 to 5.1 (2) | 1 | 1 | 0 | B: eager; not in this version: C |",
        "| transformers | 5.2 | - | - | - | not installed |",
        "| transformers | 5.3 | 0 | 0 | 1 | A: T u differs by 1.0 |",
    ]
