"""A run is trained in those variants that its results ask for, and a training that was left alone stands for others."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.trust.catalog import CATALOG
from benchmarks.trust.plan import completed, missing
from benchmarks.trust.settings import TrustRun
from tests.trust.stub import action, outcome

HELD_OUT = next(run for run in CATALOG if run.kind == "copy" and run.split == "held_out")
COLLAPSES = [run for run in CATALOG if run.kind == "collapse_wla"]
FIRST, SEEN = [run for run in CATALOG if run.kind == "copy" and run.split == "seen"][:2]
TREATED = {"actions": [action("applied")]}


def given(run: TrustRun, variant: str, **changes: Any) -> dict[str, Any]:
    return {**outcome({"name": run.name, "variant": variant}), "stands_for": [], **changes}


def calm(run: TrustRun, *stands_for: str, **changes: Any) -> dict[str, Any]:
    return given(run, "auto", stands_for=list(stands_for), **changes)


def asked(run: TrustRun, *results: dict[str, Any]) -> list[str]:
    return [variant for _, variant in missing([run], results)]


def test_a_calm_run_is_trained_once() -> None:
    assert asked(HELD_OUT) == ["auto"]
    assert asked(HELD_OUT, calm(HELD_OUT, "control", "auto_metric")) == []


def test_only_what_the_autopilot_decided_depends_on_its_thresholds() -> None:
    other = {"thresholds": "others"}
    assert asked(HELD_OUT, calm(HELD_OUT, "control", "auto_metric", **other)) == ["auto"]
    results = [calm(HELD_OUT, **TREATED), given(HELD_OUT, "auto_metric", **TREATED)]
    assert asked(HELD_OUT, *results, given(HELD_OUT, "control", **other)) == []
    assert asked(HELD_OUT, *results, given(HELD_OUT, "control", settings="others")) == ["control"]


def test_what_nothing_stands_for_is_trained_next() -> None:
    alone = calm(HELD_OUT, "control")
    assert asked(HELD_OUT, alone) == ["auto_metric"]
    assert asked(HELD_OUT, calm(HELD_OUT, **TREATED)) == ["auto_metric"]
    assert asked(HELD_OUT, calm(HELD_OUT, **TREATED), given(HELD_OUT, "auto_metric", stands_for=["control"])) == []
    assert asked(HELD_OUT, calm(HELD_OUT, **TREATED), given(HELD_OUT, "auto_metric", **TREATED)) == ["control"]


def test_the_first_seen_run_of_a_kind_is_trained_in_full() -> None:
    calm_first = calm(FIRST, "control", "auto_metric")
    assert missing([FIRST, SEEN], []) == [
        (FIRST.name, "auto"),
        (FIRST.name, "auto_metric"),
        (FIRST.name, "control"),
        (SEEN.name, "auto"),
    ]
    assert missing([FIRST, SEEN], [calm_first, calm(SEEN, "control", "auto_metric")]) == [
        (FIRST.name, "auto_metric"),
        (FIRST.name, "control"),
    ]


def test_controls_are_repeated_where_a_run_of_the_kind_was_treated() -> None:
    results = [
        calm(HELD_OUT, **TREATED),
        *(given(HELD_OUT, variant) for variant in ("auto_metric", "control")),
        *(given(run, variant) for run in (FIRST, SEEN) for variant in ("auto", "auto_metric", "control")),
    ]
    assert missing([FIRST, SEEN, HELD_OUT], results) == [(FIRST.name, "repeat"), (SEEN.name, "repeat")]
    assert missing([HELD_OUT], results) == []


@pytest.mark.parametrize(
    ("control", "auto", "expected"), [(0.95, 0.95, []), (0.4, 0.99, []), (0.4, 0.5, ["remedy"]), (0.95, 0.2, [])]
)
def test_a_collapse_needs_the_remedy_where_nothing_else_tells_the_label(
    control: float, auto: float, expected: list[str]
) -> None:
    run = next(run for run in COLLAPSES if run.split == "held_out")
    results = [
        given(run, "control", accuracy=control),
        given(run, "auto", accuracy=auto, **TREATED),
        given(run, "auto_metric", accuracy=auto, **TREATED),
    ]
    assert asked(run, *results) == expected


def test_a_healthy_label_is_checked_where_the_control_does_not_solve_the_task() -> None:
    assert HELD_OUT.setting.check_label
    assert asked(HELD_OUT, calm(HELD_OUT, "control", "auto_metric", accuracy=0.5)) == ["remedy"]


def test_a_training_stands_for_others_only_while_they_have_no_result() -> None:
    auto = calm(HELD_OUT, "control", "auto_metric", loss=1.0)
    whole = completed({"auto": auto, "control": given(HELD_OUT, "control", loss=2.0)})
    assert {variant: result["loss"] for variant, result in whole.items()} == {
        "auto": 1.0,
        "auto_metric": 1.0,
        "control": 2.0,
    }
    assert whole["auto_metric"]["variant"] == "auto_metric"
    assert set(completed({"auto": calm(HELD_OUT)})) == {"auto"}
